"""A teacher's signal on disk: written once, read by every student, seed and restart.

    FOLDER/manifest.json      whose signal it is, for which tokens, and how it is kept
    FOLDER/shard-00000.bin    windows one after another: records of its tokens, CRC-32 of them

Shards are written aside and renamed, so one that is there is whole; any number of processes may
write different shards at the same time, and a run that was stopped goes on with those that are
missing. Files are mapped into memory; every window is checked against its sum when it is read.

A token's record, little-endian, in this order:

    words          (top_k + samples) x 2 or 3 bytes   token ids, the top_k first, likeliest first
    shares         top_k x float16                    log-probability of each of the top_k
    rest           float16                            log-probability of all other words together
    label loss     float16                            the teacher's cross-entropy, nats
    entropy        float16                            the teacher's, nats
    soft entropy   float16                            only at a temperature other than 1

Probabilities are at the cache's temperature, label loss and entropy at temperature 1. Without
samples the rest is one bucket. With them it is drawn: each sample stands for rest / samples.
"""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capgap.artifact import check_empty, difference, file_written, plain, read_json, write_json
from capgap.corpus.text import Text
from capgap.distill import CHECKSUM_BYTES, TokenRecord, chunk_rows
from capgap.distill.divergences import SparseSignal, expectation
from capgap.distill.head import HeadInput, chunks, softmax_
from capgap.distill.teacher import Batch, OnlineTeacher, read_batch
from capgap.errors import UserError

MANIFEST = "manifest.json"
SCHEMA = 2  # 1: of corpora of that schema
SHARD_BYTES = 1 << 25
# The smallest log-probability that is kept; exp of it is 0 in float32
SMALLEST = -1e4
DRAW_BLOCK = 64


class CacheFormat(TokenRecord):
    """Writes and reads the records of tokens."""

    def encode(self, source: HeadInput, targets: Tensor, places: Tensor) -> Tensor:
        """Records of a teacher's tokens, uint8 [tokens, token_bytes] on the CPU.

        targets int64 [tokens]; places [tokens] in [0, 1) decide what is drawn.
        """
        head = source.ready()
        records = []
        for rows in chunks(len(targets), chunk_rows(targets.device.type, self.vocabulary)):
            logits = head.logits_(head.product(rows))
            probabilities = torch.empty_like(logits)
            log_total = softmax_(logits, probabilities)
            label_loss = log_total - logits.gather(1, targets[rows].unsqueeze(1))
            entropies = [log_total - expectation(probabilities, logits)]
            if self.temperature != 1.0:
                log_total = softmax_(logits.div_(self.temperature), probabilities)
                entropies.append(log_total - expectation(probabilities, logits))
            # less what only fills up the head
            probabilities = probabilities[:, : self.vocabulary]
            best, words = probabilities.topk(self.top_k, dim=-1)
            others = probabilities.scatter(1, words, 0.0)
            rest = others.sum(-1, keepdim=True)
            if self.samples:
                words = torch.cat([words, _draw(others, places[rows], self.samples)], dim=1)
            floats = torch.cat([best.log(), rest.log(), label_loss, *entropies], dim=1)
            halves = floats.clamp(min=SMALLEST).to(torch.float16).cpu()
            # the lowest bytes of every word
            little = np.ascontiguousarray(words.cpu().numpy(), dtype="<i8").view(np.uint8)
            little = little.reshape(*words.shape, 8)[..., : self.word_bytes]
            ids = torch.from_numpy(little.reshape(len(words), -1))
            records.append(torch.cat([ids, halves.view(torch.uint8)], dim=1))
        return torch.cat(records)

    def decode(self, records: Tensor) -> SparseSignal:
        """uint8 [..., token_bytes] to the signal of these tokens, on their device."""
        records = records.reshape(-1, self.token_bytes)
        end = self.slots * self.word_bytes
        parts = records[:, :end].reshape(len(records), self.slots, self.word_bytes)
        words = torch.zeros(parts.shape[:2], dtype=torch.int64, device=records.device)
        for byte in range(self.word_bytes):
            words += parts[..., byte].long() << (8 * byte)
        floats = records[:, end:].contiguous().view(torch.float16).float()
        # rounded on the way to float16: what is kept adds up to 1 again
        shares = floats[:, : self.top_k + 1].exp()
        shares = shares / shares.sum(-1, keepdim=True)
        shares, tail = shares[:, : self.top_k], shares[:, self.top_k :]
        if self.samples:
            drawn = (tail / self.samples).expand(-1, self.samples)
            shares = torch.cat([shares, drawn], dim=1)
        label_loss, entropy, *more = floats[:, self.top_k + 1 :].split(1, dim=1)
        return SparseSignal(
            words=words,
            shares=shares,
            tail=None if self.samples else tail,
            label_loss=label_loss,
            entropy=entropy,
            soft_entropy=more[0] if more else entropy,
            temperature=self.temperature,
            vocabulary=self.vocabulary,
            knows_best=self.top_k > 0,
        )


def _draw(weights: Tensor, places: Tensor, samples: int) -> Tensor:
    """Words [rows, samples] drawn from weights [rows, vocabulary]: systematic sampling.

    The weights laid end to end are cut at `samples` points of equal distance, with one random
    beginning a row (places [rows]): words come in proportion to their weights, closer than in
    independent draws. Blocks of words are searched first, then those that were hit: summing all
    weights up in order would take most of the time.
    """
    rows, vocabulary = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocabulary % DRAW_BLOCK)).view(rows, -1, DRAW_BLOCK)
    sums = blocks.sum(-1).double()
    edges = sums.cumsum(-1)
    steps = torch.arange(samples, device=weights.device, dtype=torch.float64)
    points = (places.double().unsqueeze(1) + steps) / samples * edges[:, -1:]
    hit = torch.searchsorted(edges, points, right=True).clamp_max(sums.shape[1] - 1)
    into = (points - edges.gather(1, hit)) / sums.gather(1, hit) + 1
    inside = blocks.gather(1, hit.unsqueeze(-1).expand(-1, -1, DRAW_BLOCK)).double().cumsum(-1)
    # below the block's end, so that no word of weight 0 is drawn; nan where there is no weight
    target = into.nan_to_num(0.0).clamp(0.0, 1 - 1e-12).unsqueeze(-1) * inside[..., -1:]
    word = torch.searchsorted(inside, target, right=True).squeeze(-1)
    return (hit * DRAW_BLOCK + word).clamp_max(vocabulary - 1)


@dataclass(frozen=True)
class CacheIdentity:
    """A cache serves no other teacher, corpus, tokenizer, window or mask. teacher: its name, for
    people; teacher_hash: of its weights and config; dtype: it ran in."""

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
        cls, teacher: str, teacher_hash: str, dtype: str, corpus: Text, *, document_mask: bool
    ) -> "CacheIdentity":
        hashes = (corpus.corpus_hash, corpus.token_hash)
        size = (corpus.window, corpus.windows)
        return cls(teacher, teacher_hash, dtype, *hashes, *size, document_mask)


class CacheWriter:
    """Writes the shards of one cache. Raises UserError where the folder holds something else."""

    def __init__(self, folder: Path, identity: CacheIdentity, cache_format: CacheFormat) -> None:
        self.folder = folder
        self.identity = identity
        self.format = cache_format
        self.window_bytes = _window_bytes(identity.window, cache_format)
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
                raise UserError(
                    f"{self.folder} holds another cache ({other}): choose another folder"
                )
            return
        check_empty(self.folder, ours=(f".{MANIFEST}.",))
        # processes that begin together write the same
        write_json(path, manifest)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [
            shard
            for shard in range(self.num_shards)
            if _shard_problem(self.folder, shard, len(self.windows_of(shard)) * self.window_bytes)
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


def write_cache(
    writer: CacheWriter,
    teacher: OnlineTeacher,
    corpus: Text,
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    batch_windows: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the missing shards of one part of all shards; returns how many the cache still lacks.

    part (i, n): this process writes shards i, i + n, i + 2n and on. What is drawn for a token
    depends on where it stands alone, so parts and restarts change nothing. `on_batch` is told how
    many of how many windows it has written, this time.
    """
    mine, of = part
    shards = [shard for shard in writer.missing() if shard % of == mine]
    total, done = sum(len(writer.windows_of(shard)) for shard in shards), 0
    for shard in shards:
        numbers = np.asarray(writer.windows_of(shard), dtype=np.int64)
        generator = torch.Generator().manual_seed(shard)
        places = torch.rand(len(numbers), corpus.window, generator=generator)
        records: list[Tensor] = []
        for rows in chunks(len(numbers), batch_windows):
            mask = writer.identity.document_mask
            batch = read_batch(corpus, numbers[rows], document_mask=mask).to(device)
            with torch.no_grad():
                signal = teacher.signal(batch, corpus.vocabulary)
                drawn_at = places[rows].reshape(-1).to(device)
                encoded = writer.format.encode(signal, batch.targets, drawn_at)
            records += encoded.reshape(-1, corpus.window, writer.format.token_bytes).unbind(0)
            done += len(batch.windows)
            on_batch(done, total)
        writer.write(shard, records)
    return len(writer.missing())


class CachedTeacher:
    """A whole cache as the teacher of `capgap.train.loop.train`.

    Raises UserError: no cache there, one of another teacher (by its `teacher_hash`, of
    `capgap.models.identity.model_hash`, where it is given), corpus, tokenizer, window or document
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
        teacher = (manifest["teacher"], teacher_hash or manifest["teacher_hash"], manifest["dtype"])
        wanted = asdict(CacheIdentity.of(*teacher, corpus, document_mask=document_mask))
        # the tokenizer and the window first: others make another corpus too
        for key in ("tokenizer_hash", "teacher_hash", "window", *wanted):
            if manifest[key] != wanted[key]:
                raise UserError(
                    f"the cache {folder} is of another {key.removesuffix('_hash')} "
                    f"({_short(manifest[key])}, not {_short(wanted[key])}): make one with "
                    "`capgap cache`"
                )
        self.folder = folder
        self.format = CacheFormat(
            **{name: manifest[name] for name in ("vocabulary", "top_k", "samples", "temperature")}
        )
        self.dtype: str = manifest["dtype"]
        self.window = corpus.window
        self.windows_a_shard: int = manifest["windows_a_shard"]
        row = _window_bytes(corpus.window, self.format)
        self._shards: list[NDArray[np.uint8]] = []
        for shard, windows in enumerate(chunks(corpus.windows, self.windows_a_shard)):
            rows = windows.stop - windows.start
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
            shard, row = divmod(int(index), self.windows_a_shard)
            window = self._shards[shard][row]
            data, checksum = window[:-CHECKSUM_BYTES], window[-CHECKSUM_BYTES:]
            if zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little") != checksum.tobytes():
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


def _window_bytes(window: int, cache_format: CacheFormat) -> int:
    return window * cache_format.token_bytes + CHECKSUM_BYTES


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
            "corpus again and run `capgap cache` into another folder"
        )
    return manifest


def _short(value: Any) -> str:
    """A hash by its beginning, everything else as it is."""
    return value[:12] if isinstance(value, str) else str(value)
