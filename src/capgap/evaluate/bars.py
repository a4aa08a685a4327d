"""Lines of ours in place of the progress bars of lm-evaluation-harness."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import datasets

SAID_EVERY = 10.0  # seconds


@contextmanager
def quiet_harness(say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Lines of ours in place of the harness' bars, and none of its warnings: what they tell is in
    the record. All is as before afterwards."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = datasets.are_progress_bars_disabled()
    told = _Told(say)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch("lm_eval.api.task.tqdm", told),
            mock.patch("lm_eval.api.model.tqdm", told),
            mock.patch("lm_eval.models.huggingface.tqdm", told),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not had_bars:
            datasets.enable_progress_bars()


class _Told:
    """Stands where the harness draws its bars, and tells in lines how far it is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said = time.monotonic()
        self.prompts = 0

    def __call__(
        self, items: Any = None, total: int | None = None, desc: str = "", **_: Any
    ) -> Any:
        return _Bar(self, items, total, desc)

    def tell(self, what: str, done: int, total: int | None) -> None:
        # prompts are made part by part, and how many parts there are no bar knows
        if not what:
            self.prompts += 1
        if time.monotonic() - self.said <= SAID_EVERY:
            return
        self.said = time.monotonic()
        if what:
            kind = "answers" if what.startswith("Running") else "requests cut into tokens"
            self.say(f"{done:,} of {total:,} {kind}")
        else:
            self.say(f"{self.prompts:,} prompts made")


class _Bar:
    def __init__(self, told: _Told, items: Any, total: int | None, what: str) -> None:
        self.told, self.items, self.what, self.done = told, items, what, 0
        self.total = len(items) if total is None and items is not None else total

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update(1)

    def update(self, count: int = 1) -> None:
        self.done += count
        self.told.tell(self.what, self.done, self.total)

    def close(self) -> None:
        pass
