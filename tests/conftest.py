"""What many tests share: a small made-up text, its corpus, and a recipe of seconds."""

import os
import random
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

# as commands set them, before the libraries that read them are loaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from capgap.cli import main
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.text import Text

# They begin first, so that at the end no core waits long for another
LONGEST = [
    "test_parallel",
    "test_gpu_benchmark",
    "test_sweep",
    "test_storage",
    "test_chain",
    "test_search_run",
    "test_law",
    "test_pipeline_run",
    "test_docs",
    "test_report_page",
    "test_compiling",
    "test_stages",
]
WORDS = [a + b for a in ("ka", "lo", "mi", "ren", "tus") for b in ("ba", "do", "fi", "shen", "")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadfile and --no-loadscope-reorder the files begin in this order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """The server of tests/processes.py is also that of the sweeps of this process, which would
    start one that has imported less."""
    if "processes" in sys.modules:
        forkserver.ensure_running()


def made_up_text(documents: int, *, seed: int = 0) -> str:
    """Sentences with a grammar of sorts, so that a model has something to learn."""
    chooser = random.Random(seed)
    texts = []
    for _ in range(documents):
        topic = chooser.sample(WORDS, 6)
        sentences = [
            " ".join(chooser.choice(topic) for _ in range(chooser.randint(4, 9))).capitalize()
            for _ in range(chooser.randint(10, 30))
        ]
        texts.append(". ".join(sentences) + ".\n")
    return "<|endoftext|>\n".join(texts)


def part_of_library(folder: Path, *names: str) -> Path:
    """A third of the files in these folders of Python's library, copied into a folder."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for path in sorted(Path(sysconfig.get_path("stdlib"), name).glob("*.py"))[::3]:
            shutil.copy(path, folder / name)
    return folder


def wait_for_steps(out: Path, count: int, *, seconds: float = 120) -> None:
    """Until a training that writes into `out` has told so many steps."""
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + seconds
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "made_up.txt"
    path.write_text(made_up_text(300))
    return path


@pytest.fixture(scope="session")
def small_corpus(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    corpus = prepare_corpus(
        str(text_file),
        tmp_path_factory.mktemp("corpus") / "tokens",
        vocabulary=300,
        window=16,
        heldout_fraction=0.1,
        heldout_tokens=2000,
    )
    return Text.of([corpus])


@pytest.fixture
def tiny_recipe(text_file: Path) -> dict[str, Any]:
    """Plain data of a recipe that runs in seconds; tests change what they are about."""
    return {
        "name": "tiny",
        "scoring_tokens": 512,
        "corpus": {
            "source": str(text_file),
            "vocabulary": 300,
            "window": 16,
            "heldout_fraction": 0.1,
            "heldout_tokens": 1000,
        },
        "teachers": {"sizes": ["14k", "20k", "28k", "40k"], "tokens": 5120},
        "students": {"sizes": ["8k", "11k"], "tokens": [2560]},
        "training": {"batch_tokens": 256},
        "run": {"workers": 2, "device": "cpu"},
    }


@dataclass(frozen=True)
class Answer:
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Answer]]:
    """`typed("corpus", path, "--json")` is the command typed in a shell, run in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["capgap", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Answer(code if isinstance(code, int) else 0, printed.out, printed.err)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)
