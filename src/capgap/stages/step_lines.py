"""metrics.jsonl: one JSON line a step, and now and then a line for people."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgap.train.loop import Progress
    from capgap.train.metrics import StepReports
    from capgap.train.trackers import Trackers

SAID_EVERY = 10.0  # seconds


class StepLines:
    """Writes what the loop reports of a run of so many tokens. A context manager.

    `flops` a token by 6 S + 2 T; `peak` FLOPs a second of all devices. `trackers` are told the
    same lines.
    """

    def __init__(
        self,
        path: Path,
        tokens: int,
        flops: int,
        peak: float,
        say: Callable[[str], None],
        trackers: "Trackers | None" = None,
    ) -> None:
        self.path = path
        self.tokens = tokens
        self.flops = flops
        self.peak = peak
        self.say = say
        self.trackers = trackers
        self.stream: Any = None
        self.said = time.monotonic()

    def __enter__(self) -> "StepLines":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()
            if self.trackers is not None:
                self.trackers.close()

    def add(self, progress: "Progress") -> None:
        for number, step in enumerate(progress.reports):
            is_last = number == len(progress.reports) - 1
            # no learner has a report where all have failed
            if step.learners:
                self._add(step, progress.heldout if is_last else {})

    def _add(self, found: "StepReports", heldout: dict[str, float]) -> None:
        reports = {name: dict(vars(report)) for name, report in found.learners.items()}
        first = next(iter(reports.values()))
        step, tokens = first["step"], first["tokens"]
        if self.stream is None:
            logged = keep_before(self.path, step)
            if self.trackers is not None:
                self.trackers.begin(step, logged)
            self.stream = self.path.open("a", buffering=1)
        rate = None if found.seconds is None else tokens / found.seconds
        for name, report in reports.items():
            del report["step"], report["tokens"]
            if name in heldout:
                report["heldout"] = heldout[name]
        line = {
            "step": step,
            "tokens": (step + 1) * tokens,
            "tokens_per_second": rate,
            "utilisation": None if rate is None else rate * self.flops / self.peak,
            "students": reports,
        }
        self.stream.write(json.dumps(line) + "\n")
        if self.trackers is not None:
            self.trackers.log(line)
        if time.monotonic() - self.said < SAID_EVERY:
            return
        self.said = time.monotonic()
        losses = ", ".join(
            f"{name}: CE {report['ce']:.3f}"
            + ("" if report["kl"] is None else f" KL {report['kl']:.3f}")
            for name, report in reports.items()
        )
        speed = (
            "" if rate is None else f", {rate:,.0f} tokens/s ({line['utilisation']:.0%} of peak)"
        )
        self.say(f"{line['tokens'] / self.tokens:.0%}{speed}; {losses}")


def keep_before(path: Path, step: int) -> int | None:
    """A run that goes on from a checkpoint takes some steps again: their lines are cut off. Returns
    the last step that was taken, None where there is none."""
    if not path.exists():
        return None
    kept = []
    last = None
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # cut off by a kill
        last = line["step"]
        if last < step:
            kept.append(text + "\n")
    aside = path.with_name(f".{path.name}")
    aside.write_text("".join(kept))
    os.replace(aside, path)
    return last
