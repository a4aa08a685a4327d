"""Lines of ours in place of the progress bars of lm-evaluation-harness."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import datasets

from capgap.stage import paced

SAID_EVERY = 10.0  # seconds
# Where the harness draws them
DRAWN_IN = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


@contextmanager
def quiet_harness(say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Lines of ours in place of the harness' bars, and none of its warnings: what they tell is in
    the record. All is as before afterwards."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = datasets.are_progress_bars_disabled()
    bar = partial(_Bar, paced(say, SAID_EVERY), itertools.count(1))
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with ExitStack() as patches:
            for module in DRAWN_IN:
                patches.enter_context(mock.patch(f"{module}.tqdm", bar))
            yield
    finally:
        logger.setLevel(level)
        if not had_bars:
            datasets.enable_progress_bars()


class _Bar:
    """Stands where the harness draws a bar; `prompts` counts those of all bars."""

    def __init__(
        self,
        tell: Callable[[Callable[[], str]], None],
        prompts: Iterator[int],
        items: Any = None,
        total: int | None = None,
        desc: str = "",
        **_: Any,
    ) -> None:
        self.tell, self.prompts, self.items, self.what, self.done = tell, prompts, items, desc, 0
        self.total = len(items) if total is None and items is not None else total

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.what:
            kind = "answers" if self.what.startswith("Running") else "requests cut into tokens"
            self.tell(lambda: f"{self.done:,} of {self.total:,} {kind}")
        else:
            # prompts are made part by part, and how many parts there are no bar knows
            made = next(self.prompts)
            self.tell(lambda: f"{made:,} prompts made")

    def close(self) -> None:
        pass
