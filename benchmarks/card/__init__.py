"""What benchmarks/gpu.py measures, in its order. Imports no torch."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

LOSS = ("src/capgap/distill", "benchmarks/card/losses.py")
LOOP = ("src/capgap/distill", "src/capgap/train", "src/capgap/models", "benchmarks/card/steps.py")
TESTS = ("src/capgap", "tests/test_cuda.py")
PEERS = ("benchmarks/peers",)


class DoesNotFit(Exception):
    """What is measured needs more memory than there is."""


@dataclass(frozen=True)
class Place:
    """Where it is measured; `is_toy`: sizes of seconds, to see that everything still runs."""

    device: str
    is_toy: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Measurement:
    """One piece, in a process of its own.

    seconds: about what it takes on a card. sources: files and folders whose content it measures,
    from the repository's root. call: module, function and arguments. told: figures in the table,
    all where there are none. packages: without which it is skipped. limit: seconds after which it
    is ended, if other than usual.
    """

    name: str
    title: str
    seconds: int
    sources: tuple[str, ...]
    call: tuple[Any, ...]
    told: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    limit: float | None = None

    def run(self, place: Place) -> dict[str, Any]:
        """Figures by name, units in the names."""
        module, function, *arguments = self.call
        return getattr(import_module(module), function)(place, *arguments)


STEP = (
    "tokens/s",
    "share of the measured peak",
    "share of the data sheet",
    "memory, GB",
    "planned memory, GB",
    "waiting for the host",
)
PEER = ("tokens/s", "share of the measured peak", "memory, GB")
SMALL = ("tokens/s", "waiting for the host")


def _loss(vocabulary: int) -> Measurement:
    return Measurement(
        f"loss-{vocabulary}",
        f"the loss alone, 8,192 rows, {vocabulary:,} words, bf16",
        60,
        (*LOSS, *PEERS),
        ("card.losses", "loss_alone", vocabulary),
    )


def _step(name: str, title: str, told: tuple[str, ...] = STEP) -> Measurement:
    return Measurement(f"step-{name}", title, 75, LOOP, ("card.steps", "training", name), told)


def _right(name: str, title: str, tests: str) -> Measurement:
    call = ("card.right", "run_tests", tests)
    return Measurement(f"right-{name}", title, 60, TESTS, call, packages=("pytest",))


MEASUREMENTS = [
    Measurement(
        "limits",
        "the card's own limits",
        20,
        ("benchmarks/card/limits.py",),
        ("card.limits", "limits"),
    ),
    _right(
        "losses",
        "losses and gradients against float64 (`pytest -m cuda`)",
        "(loss or float64) and not compiled",
    ),
    _right(
        "training",
        "columns, caches, resume, cuts, evaluation, commands (`pytest -m cuda`)",
        "not loss and not float64 and not compiled",
    ),
    _right("compiled", "compiled layers (`pytest -m cuda`)", "compiled"),
    Measurement(
        "logits",
        "the gradient of a student near its teacher, bf16 inputs against float64",
        20,
        LOSS,
        ("card.losses", "logits"),
    ),
    *(_loss(vocabulary) for vocabulary in (32_000, 128_256, 151_665, 262_144)),
    Measurement(
        "vocabulary",
        "the loss of vocabularies that are no multiple of 8, against the next multiple of 64",
        40,
        LOSS,
        ("card.losses", "vocabularies"),
    ),
    _step("1b-of-1b", "a step: 1B student of a 1B teacher"),
    _step("1b-of-3b", "a step: 1B student of a 3B teacher"),
    _step(
        "compiled",
        '1B student of a 1B teacher with compiled layers and loss (`compile = "on"`)',
    ),
    _step("column", "a step: three 0.5B students of a 3B teacher"),
    _step("compiled-column", "three 0.5B students of a 3B teacher with compiled layers and loss"),
    _step("cached", "a step: 1B student of a 3B teacher's cache"),
    _step("3b-of-8b", "a step: 3.2B student of an 8B teacher, 8,192 tokens"),
    Measurement(
        "peer-plain",
        "the same step as 1b-of-1b in a plain loop of transformers, full logits",
        75,
        PEERS,
        ("card.steps", "peer", "plain"),
        PEER,
    ),
    Measurement(
        "peer-trl",
        "the same step as 1b-of-1b in TRL's GKDTrainer, with Liger's kernels where installed",
        85,
        PEERS,
        ("card.steps", "peer", "trl-gkd"),
        (*PEER, "with Liger's kernels"),
        ("trl", "datasets"),
    ),
    Measurement(
        "teacher-dtype",
        "a ladder's fp32 teacher in its students' precision (teacher_dtype auto)",
        30,
        LOOP,
        ("card.repairs", "teacher_dtypes"),
    ),
    Measurement(
        "checkpoint",
        "a checkpoint of a 0.5B student beside its training",
        80,
        LOOP,
        ("card.repairs", "checkpoints"),
    ),
    Measurement(
        "compile",
        "four students and a teacher with compiled layers, the last micro-batch short",
        90,
        LOOP,
        ("card.repairs", "compiled"),
    ),
    Measurement(
        "waits",
        "how often the host waits within a step, and what the clock of stages tells",
        30,
        LOOP,
        ("card.repairs", "waits"),
    ),
    _step("quickstart-teacher", "the quickstart's largest teacher", SMALL),
    _step("quickstart-column", "the quickstart's largest teacher with its students", SMALL),
    _step("column-1m", "three 1M students of a 2.5M teacher", SMALL),
    _step("column-10m", "three 10M students of a 25M teacher", SMALL),
    Measurement(
        "together",
        "several columns at once on one card, each of three 10M students of a 25M teacher",
        80,
        LOOP,
        ("card.steps", "together", "column-10m"),
    ),
    Measurement(
        "sharing",
        "a sweep of small models: as many at once on the card as it finds best",
        200,
        ("src/capgap/sweep", *LOOP),
        ("card.repairs", "sharing"),
        limit=300,
    ),
]
