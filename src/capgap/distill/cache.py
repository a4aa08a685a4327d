"""A teacher's signal on disk: written once, read by every student, seed and restart.

    FOLDER/manifest.json      whose signal it is, for which tokens, and how it is kept
    FOLDER/shard-00000.bin    windows one after another: records of its tokens, CRC-32 of them

Shards are written aside and renamed, so one that is there is whole; any number of processes may
write different shards at the same time, and a run that was stopped goes on with those that are
missing. Files are mapped into memory; every window is checked against its sum when it is read.
"""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.artifact import check_empty, difference, file_written, plain, read_json, write_json
from capgap.corpus.text import Text
from capgap.distill.cache_format import CacheFormat
from capgap.distill.cache_size import CHECKSUM_BYTES
from capgap.distill.sparse import SparseSignal
from capgap.distill.teacher import Batch, OnlineTeacher
from capgap.errors import UserError

MANIFEST = "manifest.json"
SCHEMA = 2  # 1: of corpora of that schema
SHARD_BYTES = 1 << 25


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is of: it serves no other teacher, corpus, tokenizer, window or mask.

    teacher: its name, for people; teacher_hash: of its weights and config; dtype: it ran in.
    """

    teacher: str
    teacher_hash: str
    dtype: str
    corpus_hash: str
    tokenizer_hash: str
    window: int
    windows: int
    document_mask: bool

    @classmethod
    def of(
        cls,
        teacher: str,
        teacher_hash: str,
        dtype: str,
        corpus: Text,
        *,
        document_mask: bool,
    ) -> "CacheIdentity":
        return cls(
            teacher,
            teacher_hash,
            dtype,
            corpus.corpus_hash,
            corpus.token_hash,
            corpus.window,
            corpus.windows,
            document_mask,
        )


class CacheWriter:
    """Writes the shards of one cache. Raises UserError where the folder holds something else."""

    def __init__(self, folder: Path, identity: CacheIdentity, kept: CacheFormat) -> None:
        self.folder = folder
        self.identity = identity
        self.format = kept
        self.window_bytes = _window_bytes(identity, kept)
        self.windows_a_shard = max(1, SHARD_BYTES // self.window_bytes)
        self.num_shards = -(-identity.windows // self.windows_a_shard)
        self._claim()

    def _claim(self) -> None:
        manifest = plain(
            {
                "schema": SCHEMA,
                **asdict(self.identity),
                **asdict(self.format),
                "token_bytes": self.format.token_bytes,
                "windows_a_shard": self.windows_a_shard,
            }
        )
        path = self.folder / MANIFEST
        if path.exists():
            # a name is for people: the same weights may lie in two places
            found = _read_manifest(self.folder) | {"teacher": manifest["teacher"]}
            other = difference(found, manifest)
            if other is not None:
                raise UserError(f"{self.folder} holds another cache ({other}): choose another out")
            return
        check_empty(self.folder, ours=(f".{MANIFEST}.",))
        # processes that begin together write the same
        write_json(path, manifest)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [
            shard
            for shard in range(self.num_shards)
            if _shard_problem(self.folder, shard, self._shard_bytes(shard)) is not None
        ]

    def windows_of(self, shard: int) -> range:
        first = shard * self.windows_a_shard
        return range(first, min(first + self.windows_a_shard, self.identity.windows))

    def write(self, shard: int, records: list[Tensor]) -> None:
        """One shard, from the records of its windows, each uint8 [window, token_bytes]."""
        with file_written(self.folder / _shard_name(shard)) as aside, aside.open("wb") as stream:
            for window in records:
                data = window.numpy().tobytes()
                stream.write(data)
                stream.write(zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little"))

    def _shard_bytes(self, shard: int) -> int:
        return len(self.windows_of(shard)) * self.window_bytes


@dataclass(frozen=True)
class CacheProgress:
    """Told after every batch of windows; counts are of this process, this time."""

    windows: int
    of_windows: int


def write_cache(
    writer: CacheWriter,
    teacher: OnlineTeacher,
    corpus: Text,
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    batch_windows: int = 8,
    on_batch: Callable[[CacheProgress], None] = lambda progress: None,
) -> int:
    """Writes the missing shards of one part of all shards; returns how many the cache still lacks.

    part (i, n): this process writes shards i, i + n, i + 2n and on. What is drawn for a token
    depends on its place alone, so parts and restarts change nothing.
    """
    mine, of = part
    shards = [shard for shard in writer.missing() if shard % of == mine]
    windows_to_do = sum(len(writer.windows_of(shard)) for shard in shards)
    done = 0
    for shard in shards:
        numbers = np.asarray(writer.windows_of(shard), dtype=np.int64)
        generator = torch.Generator().manual_seed(shard)
        places = torch.rand(len(numbers), corpus.window, generator=generator)
        records: list[Tensor] = []
        for start in range(0, len(numbers), batch_windows):
            rows = slice(start, start + batch_windows)
            windows = corpus.train.windows_at(numbers[rows])
            positions = None
            if writer.identity.document_mask:
                positions = torch.from_numpy(corpus.marks.positions(windows[:, :-1]))
            batch = Batch(torch.from_numpy(windows), positions).to(device)
            with torch.no_grad():
                signal = teacher.signal(batch, corpus.vocabulary)
                encoded = writer.format.encode(
                    signal, batch.targets, places[rows].reshape(-1).to(device)
                )
            records += encoded.reshape(len(windows), corpus.window, -1).unbind(0)
            done += len(windows)
            on_batch(CacheProgress(done, windows_to_do))
        writer.write(shard, records)
    return len(writer.missing())


class CachedTeacher:
    """A whole cache as the teacher of a training run.

    Raises UserError: no cache there, one of another teacher, corpus, tokenizer, window or document
    mask, one that is not finished; and, while it is read, a window that is damaged.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Text,
        *,
        document_mask: bool = False,
        teacher_hash: str | None = None,
    ) -> None:
        manifest = _read_manifest(folder)
        self.folder = folder
        self.manifest = manifest
        expected: dict[str, Any] = {
            "corpus_hash": corpus.corpus_hash,
            "tokenizer_hash": corpus.token_hash,
            "window": corpus.window,
            "windows": corpus.windows,
            "document_mask": document_mask,
        }
        if teacher_hash is not None:
            expected["teacher_hash"] = teacher_hash
        # the tokenizer first: another one makes another corpus too
        for key in ("tokenizer_hash", "teacher_hash", "window", "corpus_hash", *expected):
            if key in expected and manifest[key] != expected[key]:
                raise UserError(
                    f"the cache {folder} is of another {key.removesuffix('_hash')} "
                    f"({_short(manifest[key])}, not {_short(expected[key])}): make one with "
                    "`capgap cache`"
                )
        self.format = CacheFormat(
            **{name: manifest[name] for name in ("vocabulary", "top_k", "samples", "temperature")}
        )
        self.dtype: str = manifest["dtype"]
        self.window = corpus.window
        self.windows_a_shard: int = manifest["windows_a_shard"]
        row = corpus.window * self.format.token_bytes + CHECKSUM_BYTES
        self._shards: list[NDArray[np.uint8]] = []
        for shard, first in enumerate(range(0, corpus.windows, self.windows_a_shard)):
            rows = min(self.windows_a_shard, corpus.windows - first)
            problem = _shard_problem(folder, shard, rows * row)
            if problem is not None:
                raise UserError(
                    f"the cache {folder} is not whole ({problem}): run the same `capgap cache` "
                    "again, it goes on with what is missing"
                )
            mapped = np.memmap(folder / _shard_name(shard), np.uint8, "r", shape=(rows, row))
            self._shards.append(mapped)

    def check(self, temperature: float, divergence: str) -> None:
        """UserError for a loss that this cache cannot serve."""
        if temperature != self.format.temperature:
            raise UserError(
                f"the cache {self.folder} holds probabilities at temperature "
                f"{self.format.temperature:g}, training.temperature is {temperature:g}: make one "
                f"with `capgap cache --temperature {temperature:g}`"
            )
        if self.format.samples and divergence != "forward_kl":
            raise UserError(
                f"the cache {self.folder} holds drawn words, which estimate forward_kl alone: for "
                f"{divergence} make one with `capgap cache --samples 0`"
            )

    def fetch(self, indices: NDArray[np.int64]) -> Tensor:
        """Records of these windows, uint8 [rows, window, token_bytes], checked."""
        rows = []
        for index in indices:
            shard, place = divmod(int(index), self.windows_a_shard)
            row = self._shards[shard][place]
            data, told = row[:-CHECKSUM_BYTES], row[-CHECKSUM_BYTES:]
            if zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little") != told.tobytes():
                raise UserError(
                    f"window {index} in {self.folder / _shard_name(shard)} is damaged: delete the "
                    "file and run the same `capgap cache` again"
                )
            rows.append(data)
        records = np.stack(rows).reshape(len(rows), self.window, self.format.token_bytes)
        return torch.from_numpy(records)

    def signal(self, batch: Batch, vocabulary: int) -> SparseSignal:
        """The signal of a batch whose records were fetched, on its device."""
        assert batch.fetched is not None
        return self.format.decode(batch.fetched)


def _window_bytes(identity: CacheIdentity, kept: CacheFormat) -> int:
    return identity.window * kept.token_bytes + CHECKSUM_BYTES


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.bin"


def _shard_problem(folder: Path, shard: int, size: int) -> str | None:
    path = folder / _shard_name(shard)
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{path.name} has {found} of {size} bytes"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no teacher cache (no {MANIFEST})")
    manifest = read_json(path)
    schema = manifest.get("schema")
    if "teacher_hash" not in manifest or schema != SCHEMA:
        raise UserError(
            f"{folder} holds no teacher cache of version {SCHEMA} (found {schema}): prepare the "
            "corpus again and run `capgap cache` with another --out"
        )
    return manifest


def _short(value: Any) -> str:
    """A hash by its beginning, everything else as it is."""
    return value[:12] if isinstance(value, str) else str(value)
