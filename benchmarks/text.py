"""How fast text is prepared and read.

    python benchmarks/text.py reader
    python benchmarks/text.py prepare

`reader`: training windows out of one shard and of 1,900, in tokens a second of CPU. `prepare`: a
corpus of eight files by one process and by several, in seconds, and what the driver holds at most
while it compares the digests of many documents.
"""

import argparse
import json
import shutil
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from capgap.corpus import chunks
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.sources import Source
from capgap.corpus.split import DIGESTS, ROW
from capgap.corpus.tokens import Marks, TokenWindows

TOKENS = 190_000_000
BATCH_TOKENS = 1 << 16


def reader(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    drawn = np.random.default_rng(0)
    for number in (1, 1900):
        paths = [folder / f"{number}-{shard}.bin" for shard in range(number)]
        for path in paths:
            drawn.integers(0, 60_000, TOKENS // number, dtype=np.uint16).tofile(path)
        for window in (128, 1024):
            windows = TokenWindows([paths], np.dtype("<u2"), window, Marks(0, 0, False))
            batches = [drawn.integers(0, len(windows), BATCH_TOKENS // window) for _ in range(50)]
            rates = []
            for _ in range(5):
                began = time.process_time()
                for batch in batches:
                    windows.windows_at(batch)
                rates.append(len(batches) * BATCH_TOKENS / (time.process_time() - began))
            found = statistics.median(rates)
            yield {"shards": number, "window": window, "million tokens a second": found / 1e6}


def prepare(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    text = Path(__file__).read_bytes() + Path(chunks.__file__).read_bytes()
    words = text.split()
    drawn = np.random.default_rng(0)
    source = folder / "text"
    source.mkdir()
    for number in range(8):
        lines = (b" ".join(drawn.choice(words, 200)) for _ in range(4000))
        (source / f"{number}.txt").write_bytes(b"\n<|endoftext|>\n".join(lines))
    for workers in (1, 2):
        shutil.rmtree(folder / "out", ignore_errors=True)
        chunks.CHUNK_BYTES = 1 << 20
        began = time.monotonic()
        made = prepare_corpus(str(source), folder / "out", vocabulary=1000, workers=workers)
        taken = time.monotonic() - began
        yield {"processes": workers, "seconds": taken, "hash": made.corpus_hash[:12]}
    many = [chunks.Chunk(Source("", "files"), folder / f"{number}") for number in range(20)]
    for chunk in many:
        rows = np.zeros(arguments.documents // len(many), ROW)
        rows["high"] = np.sort(
            drawn.integers(0, 1 << 63, len(rows), dtype=np.uint64) * np.uint64(2)
        )
        rows["index"] = np.arange(len(rows))
        np.save(chunk.file("rows.npy"), rows)
        kept = {"at": 0, "documents": []}
        told = dict.fromkeys(("candidates", "sample", "largest"), kept)
        ends = dict.fromkeys(("candidates", "sample"), f"{DIGESTS:x}")
        chunk.file("read.json").write_text(json.dumps({**told, "ends": ends}))
        chunk.file("texts").touch()
    tracemalloc.start()
    began = time.monotonic()
    unique = chunks.compare(many, [], 0).unique
    taken = time.monotonic() - began
    more = tracemalloc.get_traced_memory()[1] / 1e6
    yield {"documents": arguments.documents, "unique": unique, "seconds": taken, "MB held": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reader", "prepare"))
    parser.add_argument("--documents", type=int, default=50_000_000)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        for line in globals()[arguments.what](Path(folder), arguments):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
