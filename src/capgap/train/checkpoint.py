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
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
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

from capgap.artifact import file_hash, read_json, write_text
from capgap.errors import UserError
from capgap.models.parallel import ALONE, Ranks
from capgap.train.recipe import FILE_BYTES

logger = logging.getLogger(__name__)

SCHEMA = 2
MANIFEST = "manifest.json"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """All but the tensors; heldout: held-out losses by learner, where they were taken."""

    step: int
    state: dict[str, Any]
    heldout: dict[str, float]
    place: Path | None = None


@dataclass
class CheckpointWriter:
    """Saves while training goes on, which waits for a copy in the host's memory alone.

    The next one is due `seconds` after the last, and later where that took more than `share` of
    the time: the wait for its copy, and what the thread that writes it computes, which takes a core
    and Python's lock from training. What went wrong is raised by the next call.
    """

    folder: Path
    _: KW_ONLY
    keep: int
    seconds: float
    share: float
    device: torch.device
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        # memory that a GPU can write to by itself is taken once
        self._is_gpu = self.device.type == "cuda"
        self._stager = BlockingAsyncStager(cache_staged_state_dict=self._is_gpu)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] = Future()
        self._pending.set_result(None)
        self._taken = 0.0
        self._ended = time.monotonic()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.finish()

    def is_written(self) -> bool:
        return self._pending.done()

    def has_failed(self) -> bool:
        """Whether the next call raises what went wrong."""
        return self._pending.done() and self._pending.exception() is not None

    def is_due(self) -> bool:
        """By this process' clock."""
        pause = max(self.seconds, self._taken * (1 / self.share - 1))
        return self.is_written() and time.monotonic() - self._ended > pause

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
        """Waits until what is under way is written."""
        self._pending.result()

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
    """Adds a checkpoint; the last `keep` and the one with the lowest held-out loss stay, those of
    later steps go: they are taken again. All ranks call it, each with its parts of the tensors."""
    name = f"step-{checkpoint.step:010d}"
    partial = folder / f".{name}"
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
    ranks.wait()
    try:
        writer = HuggingFaceStorageWriter(
            str(partial), fqn_to_index_mapping=_files_of(tensors), save_distributed=True
        )
        with _plainly():
            alone = ranks.mesh is None
            save(tensors, storage_writer=writer, process_group=ranks.host, no_dist=alone)
        if ranks.is_first:
            content = {"step": checkpoint.step, "state": checkpoint.state}
            write_text(partial / STATE, json.dumps(content))
        ranks.wait()
        sums = _checksums(partial, ranks)
        if ranks.is_first:
            manifest = {"schema": SCHEMA, "heldout": checkpoint.heldout, "files": sums}
            write_text(partial / MANIFEST, json.dumps(manifest))
            # damaged ones, whose steps were taken again
            for passed_over in folder.glob("step-*"):
                if passed_over.name >= name:
                    shutil.rmtree(passed_over)
            partial.rename(folder / name)
    finally:
        if ranks.is_first:
            # half a checkpoint must not go on filling a full disk
            shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_first:
        stay = _by_loss(folder)[:1] + sorted(folder.glob("step-*"))[-keep:]
        for old in set(folder.glob("step-*")) - set(stay):
            shutil.rmtree(old)
    ranks.wait()


def find_last(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The last whole checkpoint, None when there is none: a damaged one is passed over with a
    warning."""
    return _first_whole(sorted(folder.glob("step-*"), reverse=True), ranks)


def find_best(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The whole checkpoint with the lowest held-out loss, None where none was taken: the mean over
    the learners that the last one knows, since a learner that failed is in none."""
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
    states = {} if optimizer is None else optimizer.state
    for name, parameter in model.named_parameters():
        tensors[f"{prefix}/weight/{name}"] = parameter.detach()
        state = states.get(parameter, {})
        tensors |= {f"{prefix}/{key}/{name}": state[key] for key in MOMENTS if key in state}
    return tensors


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Steps that AdamW has taken: those of the loop, less refused ones. Waits for the device."""
    return next((int(state["step"].item()) for state in optimizer.state.values()), 0)


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Moments to be filled, as AdamW has them after so many steps."""
    for parameter in (one for group in optimizer.param_groups for one in group["params"]):
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
    whole = ranks.told(next(filter(_is_whole, places), None) if ranks.is_first else None)
    if whole is None:
        return None
    content = read_json(whole / STATE)
    heldout = read_json(whole / MANIFEST)["heldout"]
    return Checkpoint(content["step"], content["state"], heldout, whole)


def _is_whole(place: Path) -> bool:
    problem = _damage(place)
    if problem is not None:
        logger.warning("checkpoint %s is damaged (%s): going on from before it", place, problem)
    return problem is None


def _by_loss(folder: Path) -> list[Path]:
    """Those whose held-out losses were taken, the lowest mean first, the later one of equals."""
    taken = {}
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            losses = read_json(place / MANIFEST, schema=SCHEMA)["heldout"]
        except (UserError, KeyError):
            continue
        if losses:
            taken[place] = losses
    learners: list[str] = list(next(iter(taken.values()), {}))
    sums = {
        place: sum(losses[name] for name in learners)
        for place, losses in taken.items()
        if losses.keys() >= set(learners)
    }
    return sorted(sums, key=sums.__getitem__)


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of every tensor's file, from 1: while a file is written it is twice in memory."""
    files, file, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size > FILE_BYTES:
            file, size = file + 1, 0
        size += tensor.nbytes
        files[name] = file
    return files


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
