"""metrics.jsonl: one JSON line a step, for trackers too, and now and then a line for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.artifact import write_text
from capgap.machine import versions
from capgap.stage import Say, paced
from capgap.train.trackers import Trackers

if TYPE_CHECKING:
    from capgap.train.loop import Progress
    from capgap.train.metrics import StepReports

METRICS = "metrics.jsonl"
TRACKERS = "trackers"


class MetricsFile:
    """OUT/metrics.jsonl, and the trackers of these names, which get the same lines and what was
    `asked` for. A context manager; nothing is opened before the first line."""

    def __init__(
        self, out: Path, names: tuple[str, ...], asked: Mapping[str, Any], say: Say
    ) -> None:
        config = {**asked, "versions": versions()}
        self._trackers = Trackers(names, out / TRACKERS, out.name, config, say)
        self._path = out / METRICS
        self._stream: Any = None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        self._trackers.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """A line with its `step`."""
        if self._stream is None:
            self._trackers.begin(line["step"], _keep_before(self._path, line["step"]))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a", buffering=1)
        self._stream.write(json.dumps(line) + "\n")
        self._trackers.log(line)


class StepLines:
    """What the loop reports of a training, in `metrics` and, by `say`, now and then aloud.

    `share_of_peak` is what a token a second is of the FLOPs that all devices could do in it, by
    6 S + 2 T; `tokens` those of the training.
    """

    def __init__(
        self,
        metrics: MetricsFile,
        share_of_peak: float | None = None,
        *,
        tokens: int = 0,
        say: Say | None = None,
    ) -> None:
        self.metrics = metrics
        self.tokens = tokens
        self.share_of_peak = share_of_peak
        self.tell = say and paced(say)

    def add(self, progress: "Progress") -> None:
        for step in progress.reports:
            # no learner has a report where all have failed
            if step.learners:
                self._add(step, progress.heldout if step is progress.reports[-1] else {})

    def _add(self, found: "StepReports", heldout: dict[str, float]) -> None:
        reports = {
            name: report | ({"heldout": heldout[name]} if name in heldout else {})
            for name, report in found.learners.items()
        }
        rate = None if found.seconds is None else found.tokens / found.seconds
        line = {
            "step": found.step,
            "tokens": (found.step + 1) * found.tokens,
            "tokens_per_second": rate,
            "utilisation": rate and self.share_of_peak and rate * self.share_of_peak,
            "students": reports,
        }
        self.metrics.add(line)
        if self.tell is not None:
            self.tell(lambda: self._sentence(line))

    def _sentence(self, line: dict[str, Any]) -> str:
        rate, speed = line["tokens_per_second"], ""
        if rate is not None:
            speed = f", {rate:,.0f} tokens/s ({line['utilisation']:.0%} of peak)"
        losses = ", ".join(
            f"{name}: CE {report['ce']:.3f}"
            + ("" if report["kl"] is None else f" KL {report['kl']:.3f}")
            for name, report in line["students"].items()
        )
        return f"{line['tokens'] / self.tokens:.0%}{speed}; {losses}"


def _keep_before(path: Path, step: int) -> int | None:
    """A training that goes on from a checkpoint takes some steps again: their lines are cut off.
    Returns the last step that was taken, None where there is none."""
    kept, last = [], None
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            last = json.loads(text)["step"]
        except ValueError:
            break  # cut off by a kill
        if last < step:
            kept.append(text + "\n")
    if path.exists():
        write_text(path, "".join(kept))
    return last
