"""Time and peak memory of the commands where the vocabulary is that of Qwen or of Gemma.

    python benchmarks/large_vocabularies.py --out runs/large_vocabularies.jsonl

A llama of 0.2M non-embedding parameters reads Python's own library by a byte-level tokenizer whose
table has been filled up to 2,048, 151,936 (Qwen2.5) and 262,144 rows (Gemma 3). Every command is a
process of its own: its time from start to end, and the most memory that it held (ru_maxrss). The
table printed at the end is that of docs/benchmarks.md. Linux and macOS.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARIES = (2048, 151_936, 262_144)
SIZE, WINDOW, TOKENS = 200_000, 256, 16_384
BYTES = 200_000


def prepare(folder: Path, vocabulary: int) -> None:
    """Text, and a teacher with a tokenizer of so many rows."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    from capgap.corpus.sources import open_source
    from capgap.corpus.tokenizer import train_tokenizer
    from capgap.models.build import build_model, save_model
    from capgap.models.shape import ladder_shape

    texts, size = [], 0
    for document in open_source("stdlib").documents():
        texts.append(document.decode())
        size += len(document)
        if size > BYTES:
            break
    # capitals are another language to this tokenizer
    for name, given in (("text", texts), ("new", [one.upper() for one in texts])):
        lines = [json.dumps({"text": one}) + "\n" for one in given]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    trained = train_tokenizer([one.encode() for one in texts], VOCABULARIES[0])
    described = json.loads(trained.backend_tokenizer.to_str())
    pieces = described["model"]["vocab"]
    for row in range(len(pieces), vocabulary):
        pieces[f"filler{row}"] = row
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        eos_token=AddedToken(trained.eos_token, special=True),
    )
    shape = ladder_shape("llama", SIZE, vocabulary=vocabulary, positions=WINDOW)
    save_model(build_model(shape, seed=0), folder / "teacher", tokenizer)


def commands() -> dict[str, str]:
    """What is run, in the order in which it needs what came before."""
    reads = f"--corpus corpus --window {WINDOW}"
    return {
        "corpus": "corpus text.jsonl --tokenizer teacher --out corpus",
        "score": f"score teacher {reads} --tokens {TOKENS} --out scores.safetensors",
        "score, weights": f"score teacher {reads} --tokens {TOKENS} --method weights --out "
        "weights.safetensors",
        "prune": "prune teacher --scores scores.safetensors --keep 0.5 --out cut",
        "cache": f"cache teacher corpus --window {WINDOW} --out cache",
        "distill": f"distill teacher cut {reads} --tokens {TOKENS} --out run",
        "distill from a cache": f"distill teacher cut {reads} --tokens {TOKENS} --cache cache "
        "--out cached",
        "evaluate": f"evaluate teacher --tasks heldout {reads} --out evaluate.json",
        "adapt": f"adapt teacher --new new.jsonl --old text.jsonl --pieces 500 --tokens {TOKENS} "
        f"--window {WINDOW} --out adapted",
    }


def measure(command: str, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "capgap", *command.split()],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command}: {told}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * scale,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| command | " + " | ".join(f"{one:,} words" for one in VOCABULARIES) + " |"]
    lines.append("|---" * (1 + len(VOCABULARIES)) + "|")
    for name in commands():
        found = {one["vocabulary"]: one for one in results if one["command"] == name}
        cells = [
            f"{found[one]['cpu_seconds']:.0f} s, {found[one]['peak_bytes'] / 1e9:.2f} GB"
            if one in found
            else "not measured"
            for one in VOCABULARIES
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", type=int, default=VOCABULARIES)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for vocabulary in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), vocabulary)
            for name, command in commands().items():
                found = {
                    "command": name,
                    "vocabulary": vocabulary,
                    **measure(command, Path(folder)),
                }
                results.append(found)
                with arguments.out.open("a") as stream:
                    stream.write(json.dumps(found) + "\n")
                print(found, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
