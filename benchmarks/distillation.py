"""Speed and memory of distilling: capgap beside its peers, on the same shapes, data and settings.

    python benchmarks/distillation.py            # or `make bench`, which installs the peers too
    python benchmarks/distillation.py --quick

Every measurement is a process of its own; engines take turns, so that a noisy machine is noisy for
all of them. Tokens are those of all students trained at once. Ratios are medians of the ratios
within a repeat. Memory is the peak of the process above what it held when its models were there. It
stops where engines do not compute the same loss. On a GPU: benchmarks/gpu.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from capgap.corpus.tokens import ShardWriter, token_dtype
from capgap.machine import machine
from peers.cases import BASE, LOSS_ENGINES, STEP_ENGINES, Case, Engine, cpu_cases

ENGINES = {"step": STEP_ENGINES, "loss": LOSS_ENGINES}
PACKAGES = ("capgap", "torch", "transformers", "trl", "liger_kernel", "accelerate")
# How far engines may differ in what they compute, relative; bf16 has 8 bits
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
MB = 1e6


@dataclass(frozen=True)
class Work:
    """One engine on one case; measured once a repeat."""

    part: str
    engine: str
    case: Case

    @property
    def about(self) -> Engine:
        return ENGINES[self.part][self.engine]


@dataclass(frozen=True)
class Measurement:
    work: Work
    repeat: int
    clock: str
    seconds: dict[str, list[float]]
    checked: list[float]
    held_bytes: int
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """By the wall's clock, or by the seconds that each of its threads was at work."""
        seconds = median(self.seconds[self.clock])
        if self.clock == "cpu":
            seconds /= self.work.case.threads
        return self.work.case.tokens * self.work.about.students / seconds

    @property
    def bytes_above(self) -> int:
        return self.peak_bytes - self.held_bytes


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    return cpu_cases(
        students=["1M"] if arguments.quick else ["1M", "5M"],
        ratios=[2.5] if arguments.quick else [2.5, 10],
        vocabularies={4_096: "fp32", 32_000: "bf16"},
        window=256,
        batch_windows=2 if arguments.quick else 8,
        threads=arguments.threads,
        alpha=arguments.alpha,
    )


def make_work(cases: Iterable[Case], arguments: argparse.Namespace) -> list[Work]:
    """What is installed, and can take the cases' loss."""
    return [
        Work(part, name, case)
        for case in cases
        for part in arguments.parts
        for name, engine in ENGINES[part].items()
        if engine.installed
        and (engine.has_hard_loss or case.alpha == 1.0)
        and all(text in f"{part} {name} {case.name}" for text in arguments.only)
    ]


def write_corpus(folder: Path, vocabulary: int, tokens: int) -> None:
    """Random tokens in the form of a corpus."""
    folder.mkdir()
    dtype = token_dtype(vocabulary)
    writer = ShardWriter(folder, "train", dtype)
    writer.append(np.random.default_rng(0).integers(vocabulary, size=tokens))
    manifest = {
        "vocabulary": vocabulary,
        "marks": {"begin": 0, "end": 0, "begin_windows": False},
        "dtype": dtype.str,
        "corpus_hash": "random",
        "tokenizer_hash": "none",
        "train": {"shards": writer.shards, "tokens": tokens},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_child(asked: dict[str, Any]) -> dict[str, Any]:
    """Raises SystemExit with what the process wrote where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "peers.measure", json.dumps(asked)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{asked['engine']} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(work: Work, repeat: int, folder: Path, arguments: argparse.Namespace) -> Measurement:
    asked = {
        "part": work.part,
        "engine": work.engine,
        "case": work.case.as_dict(),
        "corpus": str(folder / str(work.case.student.vocabulary)),
        "threads": work.case.threads,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }
    return Measurement(work, repeat, arguments.clock, **run_child(asked))


def check_agreement(measurements: Sequence[Measurement]) -> None:
    """All engines of a case that say so compute the same; SystemExit where one does not."""
    first, *others = (one for one in measurements if one.work.about.is_exact)
    for other in others:
        for ours, theirs in zip(first.checked, other.checked, strict=True):
            if not abs(ours - theirs) <= TOLERANCE[first.work.case.precision] * abs(ours):
                raise SystemExit(
                    f"{first.work.case.name}: {other.work.engine} computes {other.checked}, "
                    f"{first.work.engine} {first.checked}"
                )


def run_all(work: Sequence[Work], arguments: argparse.Namespace) -> list[Measurement]:
    found: list[Measurement] = []
    steps = arguments.warmup + arguments.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for vocabulary in {one.case.student.vocabulary for one in work}:
            most = max(one.case.tokens for one in work)
            write_corpus(folder / str(vocabulary), vocabulary, most * steps + 1)
        for repeat in range(arguments.repeats):
            for group in _groups(work):
                measured = []
                for one in group:
                    measured.append(measure(one, repeat, folder, arguments))
                    _tell(measured[-1])
                check_agreement(measured)
                found += measured
    return found


def _groups(work: Sequence[Work]) -> list[list[Work]]:
    """Engines that are compared with each other."""
    groups: dict[tuple[str, Case], list[Work]] = {}
    for one in work:
        groups.setdefault((one.part, one.case), []).append(one)
    return list(groups.values())


def _tell(found: Measurement) -> None:
    work = found.work
    print(
        f"{work.part} {work.case.name}: {work.engine} {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.bytes_above / MB:,.0f} MB",
        file=sys.stderr,
        flush=True,
    )


def table(found: Sequence[Measurement], part: str) -> list[str]:
    """Lines of markdown, a row for every case and engine."""
    base = ENGINES[part][BASE[part]].title
    columns = ["case", "engine", "tokens/s", f"x {base}", "memory, MB", f"x {base}"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for group in _groups([one.work for one in found if one.work.part == part and not one.repeat]):
        of_base = [one for one in found if one.work.case == group[0].case]
        of_base = [one for one in of_base if (one.work.part, one.work.engine) == (part, BASE[part])]
        for work in group:
            mine = [one for one in found if one.work == work]
            speed = median(one.tokens_per_second for one in mine)
            cells = [
                work.case.name,
                work.about.title,
                f"{speed:,.0f}",
                _ratio([one.tokens_per_second for one in mine], of_base, "tokens_per_second"),
                f"{median(one.bytes_above for one in mine) / MB:,.0f}",
                _ratio([one.bytes_above for one in mine], of_base, "bytes_above"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(values: Sequence[float], base: Sequence[Measurement], name: str) -> str:
    """The median over repeats; empty without a base."""
    if not base:
        return ""
    pairs = zip(values, base, strict=True)
    return f"{median(value / getattr(one, name) for value, one in pairs):.2f}"


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, date and settings: what belongs beside the numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": date.today().isoformat(),
        "machine": machine("cpu", arguments.threads),
        "versions": versions,
        "settings": {
            name: getattr(arguments, name)
            for name in ("alpha", "repeats", "steps", "warmup", "clock")
        },
    }


def print_report(found: Sequence[Measurement], about: dict[str, Any]) -> None:
    print(f"date: {about['date']}")
    for key in ("machine", "versions", "settings"):
        values = (f"{name} {value}" for name, value in about[key].items())
        print(f"{key}: {', '.join(values)}")
    for part in ENGINES:
        if any(one.work.part == part for one in found):
            print(f"\n{'Training steps' if part == 'step' else 'The loss alone'}\n")
            print("\n".join(table(found, part)))


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="measurements whose part, engine and case hold all of these: --only trl 4,096",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small cases, once, in a minute or two"
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: seconds at work, for a machine with other work on it (take --threads 1)",
    )
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="below 1, labels take part, and TRL does not"
    )
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    arguments = parser.parse_args(given)
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    about = describe(arguments)
    found = run_all(make_work(make_cases(arguments), arguments), arguments)
    if arguments.json:
        content = about | {"measurements": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print_report(found, about)


if __name__ == "__main__":
    main()
