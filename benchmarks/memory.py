"""Predicted memory of training beside the measured peak, for shapes, batches and settings.

    python benchmarks/memory.py --out docs/results/memory.jsonl
    python benchmarks/memory.py --only gpt2 --default-allocator

Every case is a process of its own that drives `capgap.train.loop.train` for two steps on random
tokens. Measured is the most that the process held above what it held before its models were made; a
tiny training before that has loaded all libraries. glibc keeps freed memory for later, and how much
depends on the order in which it was freed, so it is told to hand memory back at once
(MALLOC_MMAP_THRESHOLD_), unless --default-allocator asks what it holds otherwise. Linux alone.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capgap.models.shape import Shape, ladder_shape
from capgap.sizes import format_count
from capgap.train.memory import LoopMemory

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 2
MB = 1e6


@dataclass(frozen=True)
class Case:
    """One training: students and their teacher, if any, and how a step is taken."""

    name: str
    students: tuple[Shape, ...]
    window: int
    micro_batch_tokens: int
    teacher: Shape | None = None
    micro_batches: int = 1
    autocast: bool = False
    activation_checkpointing: bool = False
    document_mask: bool = False

    def predicted(self) -> tuple[str, dict[str, int]]:
        return LoopMemory(
            students=self.students,
            teacher=self.teacher,
            window=self.window,
            micro_batch_tokens=self.micro_batch_tokens,
            micro_batches=self.micro_batches,
            autocast=self.autocast,
            teacher_bytes=2 if self.autocast else 4,
            activation_checkpointing=self.activation_checkpointing,
            document_mask=self.document_mask,
        ).peak()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Case":
        students = tuple(Shape(**one) for one in data["students"])
        teacher = None if data["teacher"] is None else Shape(**data["teacher"])
        return cls(**(data | {"students": students, "teacher": teacher}))


def make_cases() -> list[Case]:
    def ladder(size: int, vocabulary: int, architecture: str = "llama") -> Shape:
        return ladder_shape(architecture, size, vocabulary=vocabulary, positions=1024)

    grouped = Shape("llama", 512, 8, 8, 2, 64, 1536, 32_000, 1024, tied=False)
    above = Shape("llama", 768, 8, 12, 3, 64, 2304, 32_000, 1024, tied=False)
    m20, m30 = ladder(20_000_000, 8_192), ladder(30_000_000, 8_192)
    m50 = ladder(50_000_000, 8_192)
    return [
        Case("llama", (m30,), 512, 4096),
        Case("llama, 2 micro-batches", (m30,), 512, 4096, micro_batches=2),
        Case("llama, checkpointing", (m30,), 512, 4096, activation_checkpointing=True),
        Case("llama, windows of 1,024", (m20,), 1024, 4096),
        Case(
            "llama, 8,192 tokens, checkpointing",
            (ladder(30_000_000, 4_096),),
            256,
            8192,
            activation_checkpointing=True,
        ),
        Case("llama, document mask", (m20,), 512, 2048, document_mask=True),
        Case("llama, teacher", (m20,), 512, 4096, m50),
        Case(
            "llama, teacher, checkpointing", (m20,), 512, 4096, m50, activation_checkpointing=True
        ),
        Case(
            "llama, teacher, 3 students",
            (ladder(5_000_000, 8_192), ladder(8_000_000, 8_192), ladder(12_000_000, 8_192)),
            256,
            2048,
            ladder(30_000_000, 8_192),
        ),
        Case(
            "llama, large teacher",
            (ladder(5_000_000, 8_192),),
            256,
            2048,
            ladder(120_000_000, 8_192),
            activation_checkpointing=True,
        ),
        Case("llama, tied, 1,024 tokens", (ladder(20_000_000, 32_000),), 256, 1024),
        Case("llama, grouped, untied", (grouped,), 512, 2048),
        Case(
            "llama, grouped, untied, teacher, 2 micro-batches",
            (grouped,),
            512,
            2048,
            above,
            micro_batches=2,
        ),
        Case("gpt2", (ladder(20_000_000, 8_192, "gpt2"),), 256, 4096),
        Case("gpt_neox", (ladder(20_000_000, 8_192, "gpt_neox"),), 256, 4096),
        Case(
            "gpt_neox, teacher, checkpointing",
            (ladder(30_000_000, 16_384, "gpt_neox"),),
            512,
            4096,
            ladder(75_000_000, 16_384, "gpt_neox"),
            activation_checkpointing=True,
        ),
        Case("qwen3", (ladder(20_000_000, 8_192, "qwen3"),), 512, 2048),
        Case("gemma2", (ladder(20_000_000, 8_192, "gemma2"),), 512, 2048),
        Case(
            "llama, bf16, teacher",
            (ladder(10_000_000, 8_192),),
            256,
            2048,
            ladder(25_000_000, 8_192),
            autocast=True,
        ),
        Case(
            "llama, bf16, checkpointing, 2 micro-batches",
            (ladder(60_000_000, 8_192),),
            256,
            1024,
            micro_batches=2,
            autocast=True,
            activation_checkpointing=True,
        ),
    ]


def run_case(case: Case, folder: Path) -> None:
    """Trains it; random tokens, layers not compiled."""
    import torch

    from capgap.corpus.text import Text
    from capgap.corpus.tokens import Corpus
    from capgap.distill.teacher import OnlineTeacher
    from capgap.models.build import build_model
    from capgap.train.learner import Learner
    from capgap.train.loop import LoopSettings, train
    from distillation import write_corpus

    batch = case.micro_batch_tokens * case.micro_batches
    write_corpus(folder, case.students[0].vocabulary, STEPS * batch + 1)
    corpus = Text.of(
        [Corpus(folder, json.loads((folder / "manifest.json").read_text()), case.window)]
    )
    low = torch.bfloat16 if case.autocast else None
    teacher = None
    if case.teacher is not None:
        teacher = OnlineTeacher(build_model(case.teacher, seed=0).to(low or torch.float32))
    learners = [
        Learner(
            str(number),
            build_model(shape, seed=1 + number),
            STEPS,
            1e-4,
            0.0 if teacher is None else 0.5,
        )
        for number, shape in enumerate(case.students)
    ]
    settings = LoopSettings(
        batch // case.window,
        case.micro_batch_tokens // case.window,
        0,
        document_mask=case.document_mask,
        activation_checkpointing=case.activation_checkpointing,
        autocast_dtype=low,
    )
    train(learners, corpus, settings, teacher=teacher)


def measure_here(case: Case) -> int:
    """Peak bytes above those before the models were made."""
    from peers.watch import MemoryMeter

    small = ladder_shape("llama", 50_000, vocabulary=300, positions=64)
    tiny = Case("tiny", (small,), 64, 128, small, autocast=case.autocast)
    with tempfile.TemporaryDirectory() as name:
        run_case(tiny, Path(name) / "tiny")
        gc.collect()
        meter = MemoryMeter("cpu")
        run_case(case, Path(name) / "case")
        return meter.peak() - meter.held


def measure(case: Case, *, threads: int, default_allocator: bool) -> int:
    """In a process of its own; SystemExit with what it wrote where it fails."""
    environment = os.environ | ({} if default_allocator else AT_ONCE)
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--threads", str(threads)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-4000:]}")
    return int(done.stdout.splitlines()[-1])


def row(case: Case, measured: int) -> list[str]:
    phase, parts = case.predicted()
    total = sum(parts.values())
    sizes = ", ".join(format_count(one.parameters().total) for one in case.students)
    above = "" if case.teacher is None else format_count(case.teacher.parameters().total)
    return [
        case.name,
        sizes,
        above,
        f"{case.students[0].vocabulary:,}",
        f"{measured / MB:,.0f}",
        f"{total / MB:,.0f}",
        f"{total / measured - 1:+.1%}",
        phase.replace("_", " "),
    ]


def run_all(cases: Sequence[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    columns = ["case", "students", "teacher", "words", "measured, MB", "predicted, MB", "error"]
    print("| " + " | ".join([*columns, "at its peak"]) + " |")
    print("|---" * 8 + "|")
    found = []
    for case in cases:
        measured = measure(
            case, threads=arguments.threads, default_allocator=arguments.default_allocator
        )
        phase, parts = case.predicted()
        found.append({"case": case.name, "measured": measured, "phase": phase, "parts": parts})
        print("| " + " | ".join(row(case, measured)) + " |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the figures, a case a line")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(arguments.threads)
        print(measure_here(Case.from_dict(json.loads(arguments.case))))
        return
    cases = [one for one in make_cases() if arguments.only in one.name]
    found = run_all(cases, arguments)
    errors = [sum(one["parts"].values()) / one["measured"] - 1 for one in found]
    print(f"\nlargest error {max(errors, key=abs):+.1%} of {len(found)} cases")
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(one) + "\n" for one in found))


if __name__ == "__main__":
    main()
