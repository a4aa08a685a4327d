"""Checkpoints of a training run: a folder for each, written aside and renamed, with checksums.

    FOLDER/step-0000001200/shard-*.safetensors   weights and moments, a file of every rank
    FOLDER/step-0000001200/state.json            step, curves, what the optimizers have counted
    FOLDER/step-0000001200/manifest.json         bytes and sha256 of all other files, written last

Batches are a pure function of (seed, step), so the weights, the optimizer's moments and the step
are the whole state. torch.distributed.checkpoint writes the tensors, on one rank as on many: a
checkpoint of any number of ranks can be read by any other number. No pickle.
"""

import copy
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from capgap.artifact import file_hash, read_json
from capgap.errors import UserError
from capgap.models.parallel import ALONE, Ranks
from capgap.train.checkpoint_size import FILE_BYTES

logger = logging.getLogger(__name__)

SCHEMA = 2
MANIFEST = "manifest.json"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """All of a checkpoint but its tensors; heldout: held-out losses by learner, where they were
    taken."""

    step: int
    state: dict[str, Any]
    heldout: dict[str, float]
    place: Path | None = None


class CheckpointWriter:
    """Saves while training goes on, which waits for a copy in the host's memory alone.

    The next one is due `seconds` after the last, and later where that took more than `share` of
    the time: the wait for its copy, and what the thread that writes it computes meanwhile, which
    takes a core and Python's lock from training. A context manager, which waits for what is under
    way; what went wrong is raised by the next call.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        seconds: float,
        share: float,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.seconds = seconds
        self.share = share
        self.device = device
        self.ranks = ranks
        # memory that a GPU can write to by itself is taken once
        self._is_gpu = device.type == "cuda"
        self._stager = BlockingAsyncStager(cache_staged_state_dict=self._is_gpu)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._taken = 0.0
        self._ended = time.monotonic()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.finish()

    def is_written(self) -> bool:
        """Whether nothing is under way."""
        return self._pending is None or self._pending.done()

    def has_failed(self) -> bool:
        """Whether the next call raises what went wrong."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def is_due(self) -> bool:
        """By this process' clock."""
        if not self.is_written():
            return False
        pause = max(self.seconds, self._taken * (1 / self.share - 1))
        return time.monotonic() - self._ended > pause

    def save(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Begins to write; waits for the one before. All ranks call it."""
        began = time.monotonic()
        self.finish()
        # the next step changes all of it
        tensors = self._stager.stage(tensors)
        checkpoint = copy.deepcopy(checkpoint)
        self._taken = time.monotonic() - began
        self._pending = self._thread.submit(self._write, checkpoint, tensors)

    def finish(self) -> None:
        """Until what is under way is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        began = time.thread_time()
        # a queue of its own on a GPU: waiting for this one would be waiting for the training
        with torch.cuda.stream(torch.cuda.Stream(self.device) if self._is_gpu else None):
            ranks = self.ranks.apart
            save_checkpoint(self.folder, checkpoint, tensors, keep=self.keep, ranks=ranks)
        self._taken += time.thread_time() - began
        self._ended = time.monotonic()


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    *,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> None:
    """Adds a checkpoint; the last `keep` and the one with the lowest held-out loss stay.

    Those of later steps go: a run that takes them again has passed them over. All ranks call it,
    each with its own parts of the tensors.
    """
    name = f"step-{checkpoint.step:010d}"
    place, partial = folder / name, folder / f".{name}"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
    ranks.wait()
    try:
        files = _files_of(tensors)
        writer = HuggingFaceStorageWriter(
            str(partial), fqn_to_index_mapping=files, save_distributed=True
        )
        with _plainly():
            save(
                tensors,
                storage_writer=writer,
                process_group=ranks.host,
                no_dist=ranks.mesh is None,
            )
        if ranks.is_first:
            _write(partial / STATE, {"step": checkpoint.step, "state": checkpoint.state})
        ranks.wait()
        sums = _checksums(partial, ranks)
        if ranks.is_first:
            manifest = {"schema": SCHEMA, "heldout": checkpoint.heldout, "files": sums}
            _write(partial / MANIFEST, manifest)
            # damaged ones, whose steps were taken again
            for passed_over in folder.glob("step-*"):
                if passed_over.name >= name:
                    shutil.rmtree(passed_over)
            partial.rename(place)
    finally:
        if ranks.is_first:
            # half a checkpoint must not go on filling a full disk
            shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_first:
        for old in _superfluous(folder, keep):
            shutil.rmtree(old)
    ranks.wait()


def find_last(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The last whole checkpoint of the folder, None when there is none.

    A truncated or changed one is passed over with a warning, and the one before it is taken.
    """
    return _first_whole(sorted(folder.glob("step-*"), reverse=True), ranks)


def find_best(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The whole checkpoint with the lowest held-out loss, None where none was taken.

    It is the mean over the learners that the last one knows: a learner that failed is in none.
    """
    return _first_whole(_by_loss(folder), ranks)


def read_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Fills these tensors, a part of those that were saved, each rank its own parts of them."""
    with _plainly():
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(checkpoint.place)),
            no_dist=ranks.mesh is None,
        )


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, prefix: str
) -> dict[str, Tensor]:
    """Weights and moments by parameter name; tied parameters appear once."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{prefix}/weight/{name}"] = parameter.detach()
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors |= {f"{prefix}/{key}/{name}": state[key] for key in MOMENTS if key in state}
    return tensors


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Steps that AdamW has taken: those of the loop, less refused ones. Waits for the device."""
    return next((int(state["step"].item()) for state in optimizer.state.values()), 0)


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Moments to be filled, as AdamW has them after so many steps."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            step = torch.tensor(float(count), device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}


@contextmanager
def _plainly() -> Iterator[None]:
    """Lets torch.distributed.checkpoint work on one rank, and raise what went wrong as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _first_whole(places: list[Path], ranks: Ranks) -> Checkpoint | None:
    # one rank looks for all, or they could choose differently
    found = None
    for place in places if ranks.is_first else []:
        problem = _damage(place)
        if problem is None:
            found = place
            break
        logger.warning("checkpoint %s is damaged (%s): going on from before it", place, problem)
    found = ranks.told(found)
    if found is None:
        return None
    content = read_json(found / STATE)
    heldout = read_json(found / MANIFEST)["heldout"]
    return Checkpoint(content["step"], content["state"], heldout, found)


def _by_loss(folder: Path) -> list[Path]:
    """Those whose held-out losses were taken, the lowest mean first, the later one of equals."""
    found = []
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            losses = read_json(place / MANIFEST, schema=SCHEMA)["heldout"]
        except (UserError, KeyError):
            continue
        if losses:
            found.append((place, losses))
    learners = found[0][1] if found else {}
    means = [
        (sum(losses[name] for name in learners) / len(learners), place)
        for place, losses in found
        if learners.keys() <= losses.keys()
    ]
    return [place for _, place in sorted(means, key=lambda one: one[0])]


def _superfluous(folder: Path, keep: int) -> list[Path]:
    kept = _by_loss(folder)[:1] + sorted(folder.glob("step-*"))[-keep:]
    return [place for place in folder.glob("step-*") if place not in kept]


def _write(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of every tensor's file, from 1: while a file is written it is twice in memory."""
    found, file, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size > FILE_BYTES:
            file, size = file + 1, 0
        size += tensor.nbytes
        found[name] = file
    return found


def _checksums(place: Path, ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
    """Of all files but the manifest; the ranks share the reading."""
    found = {}
    paths = sorted(path for path in place.iterdir() if path.name != MANIFEST)
    for path in paths[ranks.rank :: ranks.world]:
        found[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    return {name: entry for part in ranks.collect(found) for name, entry in part.items()}


def _damage(place: Path) -> str | None:
    """What differs from the manifest, or None."""
    try:
        expected = read_json(place / MANIFEST, schema=SCHEMA, files=dict)["files"]
    except UserError as error:
        return str(error)
    found = _checksums(place)
    for name, entry in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != entry["bytes"]:
            return f"{name} has {found[name]['bytes']} of {entry['bytes']} bytes"
        if found[name] != entry:
            return f"{name} has another sha256"
    return None
