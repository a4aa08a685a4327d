"""Memory and time of a cut: a large checkpoint made up here, pruned by the command.

    python benchmarks/surgery.py --out runs/surgery --layers 32

The teacher has LLaMA's widths (hidden 4096, FFN 11008, bf16) and random weights; 32 layers are
13.5 GB. Peaks are those of the whole process as the system tells them; what Python and torch take
before any weight is read is that of `--dry-run`.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any


def make_teacher(folder: Path, layers: int) -> None:
    """Written tensor by tensor, as the cut is."""
    import torch

    from capgap.models.build import to_config
    from capgap.models.shape import Shape
    from capgap.models.stored import skeleton_of, write_weights, written_beside

    shape = Shape("llama", 4096, layers, 32, 32, 128, 11008, 32000, 4096, False)
    config = to_config(shape)
    config.dtype = torch.bfloat16
    skeleton = skeleton_of(config, lambda name: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        sizes = skeleton[name].shape
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    with written_beside(folder) as partial:
        config.save_pretrained(partial)
        write_weights(partial, skeleton, make)


def run(*command: object) -> dict[str, Any]:
    """What a command prints as JSON, with its seconds and its peak in bytes."""
    read, write = os.pipe()
    words = [sys.executable, "-m", "capgap", *(str(word) for word in command), "--json"]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.close(read)
        os.execv(words[0], words)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"failed: {' '.join(words)}")
    peak = {"seconds": time.monotonic() - start, "peak_bytes": usage.ru_maxrss * 1024}
    return {"said": json.loads(said), **peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.8, 0.4))
    arguments = parser.parse_args()
    teacher, scores = arguments.out / "teacher", arguments.out / "scores.safetensors"
    if not teacher.exists():
        make_teacher(teacher, arguments.layers)
    if not scores.exists():
        run("score", teacher, "--method", "random", "--out", scores)
    print("| keep | teacher | student | largest tensor | peak | beside Python's | allowed | time |")
    print("|---" * 8 + "|")
    for keep in arguments.keeps:
        student = arguments.out / f"student-{keep:g}"
        shutil.rmtree(student, ignore_errors=True)
        asked = ("prune", teacher, "--scores", scores, "--out", student, "--keep", keep)
        before = run(*asked, "--dry-run")
        found = run(*asked)
        said = found["said"]
        size = {
            "teacher": 2 * said["teacher_parameters"]["total"],
            "student": said["student_bytes"],
        }
        allowed = 1.2 * size["student"] + said["largest_tensor_bytes"]
        cells = (
            f"{keep:g}",
            *(f"{size[name] / 1e9:.2f} GB" for name in ("teacher", "student")),
            f"{said['largest_tensor_bytes'] / 1e9:.2f} GB",
            f"{found['peak_bytes'] / 1e9:.2f} GB",
            f"{(found['peak_bytes'] - before['peak_bytes']) / 1e9:.2f} GB",
            f"{allowed / 1e9:.2f} GB",
            f"{found['seconds']:.0f} s",
        )
        print("| " + " | ".join(cells) + " |", flush=True)
        shutil.rmtree(student)


if __name__ == "__main__":
    main()
