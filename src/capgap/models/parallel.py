"""The processes that train together, and how models lie on them. The only file that names a mesh.

Alone, every function here does nothing, so that the loop is the same for one process and for many:
`torchrun --nproc-per-node 2 -m capgap distill ...`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from capgap.errors import UserError
from capgap.machine import started
from capgap.models.parts import Parts

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    host: how the hosts talk to each other, None as everything else; background: the same for a
    thread that works beside the training.
    """

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    host: dist.ProcessGroup | None = field(default=None, repr=False)
    background: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Who writes what is written once."""
        return self.rank == 0

    @property
    def apart(self) -> "Ranks":
        """The same ranks, in a thread of their own beside the training."""
        return replace(self, host=self.background)

    def share(self, count: int, rank: int | None = None) -> slice:
        """A rank's part, by default one's own, of a batch of `count` windows.

        UserError where parts are not equal: every rank takes part in every exchange of weights.
        """
        if count % self.world:
            raise UserError(
                f"a batch of {count} windows cannot be shared evenly by {self.world} processes: "
                "change training.batch_tokens or --nproc-per-node"
            )
        each = count // self.world
        rank = self.rank if rank is None else rank
        return slice(rank * each, (rank + 1) * each)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks; on a GPU the host does not wait for it."""
        if self.mesh is None:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """A tensor of every rank, [ranks, ...]."""
        if self.mesh is None:
            return values.unsqueeze(0)
        gathered = values.new_empty(self.world, *values.shape)
        dist.all_gather(list(gathered.unbind()), values.contiguous())
        return gathered

    def agree(self, *wishes: bool) -> list[bool]:
        """For each, whether any rank wishes it. Hosts talk to each other; no device waits."""
        if self.mesh is None:
            return list(wishes)
        wished = torch.tensor(wishes, dtype=torch.int32)
        dist.all_reduce(wished, dist.ReduceOp.MAX, group=self.host)
        return wished.bool().tolist()

    def told(self, value: T) -> T:
        """The first rank's value, on all."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.host, device=torch.device("cpu"))
        return box[0]

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on all."""
        if self.mesh is None:
            return [value]
        values = [value] * self.world
        dist.all_gather_object(values, value, group=self.host)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, for which the others wait; its UserError too."""
        outcome: Any = None
        if self.is_first:
            try:
                outcome = work()
            except UserError as error:
                outcome = error
        outcome = self.told(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def wait(self) -> None:
        """Until all ranks are here."""
        self.agree(False)


ALONE = Ranks()


@contextmanager
def joined(device: str, batch_windows: int, shard_size: int | None = None) -> Iterator[Ranks]:
    """All processes that torchrun has started, as one; `ALONE` without it. Every `shard_size` of
    them, all if None, share a copy of the models.

    UserError, the same in all, where they cannot share copies, or a batch of so many windows.
    """
    _, world = started()
    if world == 1:
        yield ALONE
        return
    Ranks(world=world).share(batch_windows)
    size = shard_size or world
    if world % size:
        raise UserError(f"run.shard_size {size} does not divide the {world} processes: change it")
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device))
    # the hosts agree among themselves without a device
    dist.init_process_group("gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl")
    sizes = {"copies": world // size, "shards": size} if size < world else {"shards": world}
    mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    with warnings.catch_warnings():
        # nothing changes hidden states in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield Ranks(dist.get_rank(), world, mesh, background=dist.new_group(backend="gloo"))
    # not after an error: NCCL would wait for ranks that are still at work. Without a barrier gloo's
    # threads may still let go of a tensor when Python ends, which aborts the process
    dist.barrier(device_ids=None if kind == "cpu" else [torch.cuda.current_device()])
    dist.destroy_process_group()


def parallelize(
    parts: Parts, ranks: Ranks, device: torch.device, *, in_bf16: bool = False
) -> Parts:
    """Puts a model of the CPU on the device, sharded over all ranks where `joined` gave several.

    FSDP2: every rank keeps its part of every weight, gradient and moment. A layer's weights are
    together while it computes; those outside of layers (tables, head) until the end of the backward
    pass, so that the loss finds the head whole, or until `release` where there is none. Gradients
    are sums over ranks, as losses are. `in_bf16`: layers' weights, fp32 where they lie, travel and
    compute in bf16, which halves the traffic. Returns the parts it was given.
    """
    if ranks.mesh is None:
        parts.model.to(device)
        return parts
    low = torch.bfloat16
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    for layer in parts.layers:
        if in_bf16:
            # where losses are held out nobody else does it
            layer.forward = torch.autocast(device.type, low)(layer.forward)
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy if in_bf16 else MixedPrecisionPolicy())
    fully_shard(parts, mesh=ranks.mesh, reshard_after_forward=False)
    for module in parts.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows no other
            module.set_force_sum_reduction_for_comms(True)
    return parts


def release(parts: Parts) -> None:
    """After forward passes without a backward pass: every rank keeps its part alone again, and FSDP
    forgets what it noted for a backward pass."""
    if isinstance(parts, FSDPModule):
        # torch 2.11 has no reset_iter_state
        getattr(parts, "reset_iter_state", parts.reshard)()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in parts on all ranks; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(parts: Parts, ranks: Ranks) -> dict[str, Tensor]:
    """The model's own state dict on the CPU of the first rank, empty on the others."""
    weights = parts.model.state_dict(keep_vars=True)
    # tied weights stay one tensor
    gathered: dict[int, Tensor] = {}
    for weight in weights.values():
        if id(weight) not in gathered:
            full = whole(weight.detach())
            gathered[id(weight)] = full.cpu() if ranks.is_first else full.new_empty(0)
    return {name: gathered[id(one)] for name, one in weights.items()} if ranks.is_first else {}


def whole_model(parts: Parts, ranks: Ranks) -> PreTrainedModel:
    """The model for work that the first rank does alone: there whole again, a copy on its device;
    elsewhere what lies there. Every rank has to ask."""
    model = parts.model
    if ranks.mesh is None:
        return model
    weights = whole_weights(parts, ranks)
    if not ranks.is_first:
        return model
    copy = type(model)(model.config).to(model.dtype)
    copy.load_state_dict(weights)
    return copy.to(model.device)
