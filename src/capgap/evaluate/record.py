"""The record of an evaluation: it grows set by set, and what an earlier call measured stays."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from capgap.artifact import read_json, write_json, write_text
from capgap.errors import UserError
from capgap.evaluate.scores import six_mean
from capgap.evaluate.sets import SIX

# Whether another call would measure the same
_SAME = ("schema", "model_hash", "tokenizer_hash", "dtype_asked", "limit")
# Known once the model is loaded
_LOADED = ("parameters", "context", "dtype")
Result = dict[str, Any]


class Record:
    """What is asked for and what is measured of it, as docs/evaluation.md describes it.

    `about`: the keys that do not change. `results`: `heldout` by folder and `tasks` by name, in the
    order that was asked for: None until it is measured or known to be missing. `out` gets the
    record as JSON, `samples` every question and answer as a line of JSON.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        *,
        folders: Iterable[str],
        tasks: Iterable[str],
        out: Path | None,
        samples: Path | None,
    ) -> None:
        self.about = about
        self.results: dict[str, dict[str, Result | None]] = {
            "heldout": dict.fromkeys(folders),
            "tasks": dict.fromkeys(tasks),
        }
        self.out, self.samples = out, samples
        self._earlier = {} if out is None else _read(out)
        versions = self._earlier.get("versions", {})
        # the harness has none where it was not asked for anything
        if any(self._earlier.get(key) != about[key] for key in _SAME) or any(
            versions.get(name, number) != number for name, number in about["versions"].items()
        ):
            self._earlier = {}
        self.loaded = {key: self._earlier.get(key) for key in _LOADED}
        self._sampled = None if samples is None else {name for name, _ in _lines(samples)}

    def keep(self, kind: str, name: str, **measured_with: Any) -> bool:
        """Whether an earlier call measured this corpus ("heldout") or this set ("tasks") with the
        same, and a set's samples are there; then that stays."""
        found = (self._earlier.get(kind) or {}).get(name)
        if found is None or found["missing"] is not None:
            return False
        if any(found[key] != value for key, value in measured_with.items()):
            return False
        if kind == "tasks" and self._sampled is not None and name not in self._sampled:
            return False
        self.results[kind][name] = found
        return True

    def drop_samples(self) -> None:
        """Leaves the lines of sets that are kept; what a stopped call wrote of others goes."""
        if self.samples is not None:
            kept = {
                name for name, one in self.results["tasks"].items() if one and not one["missing"]
            }
            lines = [line for name, line in _lines(self.samples) if name in kept]
            write_text(self.samples, "".join(lines))

    def add(
        self, kind: str, name: str, result: Result, samples: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """What was measured now, or why nothing was."""
        if self.samples is not None:
            with self.samples.open("a", encoding="utf-8") as file:
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
        self.results[kind][name] = result
        self.write()

    def write(self, *, finished: bool = False) -> dict[str, Any]:
        """The record as it stands; the mean belongs to one that is finished."""
        tasks, heldout = (
            {name: one for name, one in self.results[kind].items() if one is not None}
            for kind in ("tasks", "heldout")
        )
        mean, why = None, None
        if finished and any(name in SIX for name in tasks):
            mean, why = six_mean(tasks, limit=self.about["limit"])
        record = {
            **self.about,
            **self.loaded,
            "finished": finished,
            "tasks": tasks,
            "heldout": heldout or None,
            "mean_percent": mean,
            "mean_missing": why,
        }
        if self.out is not None:
            write_json(self.out, record)
        return record


def _read(path: Path) -> dict[str, Any]:
    """Empty for what is no record: it is written anew."""
    try:
        return read_json(path)
    except UserError:
        return {}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(name of the set, line) of a file of samples; none of one that is not there."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)["set"], line
            except (ValueError, LookupError, TypeError):
                # cut off by a kill, or no sample
                continue
