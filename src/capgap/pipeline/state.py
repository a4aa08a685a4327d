"""What of a run is done, and what has to run (again), with the reason in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capgap.artifact import difference, digest, file_hash, flat, plain, read_json, write_json
from capgap.corpus.names import looks_like_path
from capgap.corpus.readers import SUFFIXES
from capgap.corpus.sources import open_source
from capgap.errors import UserError
from capgap.pipeline.steps import Step
from capgap.stage import Mark, Stage

RECORD = "run.json"
SCHEMA = 2
MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt")
State = Literal["done", "continue", "run"]


@dataclass(frozen=True)
class Decision:
    """done: nothing changed since it was done; continue: it was stopped; run: from its beginning,
    because of `why`."""

    step: Step
    state: State
    why: str
    inputs: dict[str, Any]


class RunState:
    """run.json of an output folder: every step's inputs and what became of it."""

    def __init__(self, out: Path, name: str) -> None:
        self.path = out / RECORD
        self.record: dict[str, Any] = {"schema": SCHEMA, "name": name, "steps": {}}
        if self.path.exists():
            self.record = read_json(self.path, schema=SCHEMA, name=str, steps=dict)
        if self.record["name"] != name:
            raise UserError(
                f"{out} holds the run {self.record['name']!r}, not {name!r}: choose another folder"
            )

    def begun(self, step: Step) -> dict[str, Any] | None:
        """What is known of a step, None where it never ran."""
        found: dict[str, Any] | None = self.record["steps"].get(step.name)
        return found

    def keep(self, step: Step, **values: Any) -> None:
        """Adds to what is known of a step, and writes it down."""
        self.record["steps"].setdefault(step.name, {}).update(values)
        write_json(self.path, self.record)

    def made_by(self, names: Sequence[str]) -> dict[str, str | None]:
        """Which start of each of these steps made what lies there now."""
        steps = self.record["steps"]
        return {name: steps[name]["id"] if name in steps else None for name in names}

    def forget_others(self, steps: Sequence[Step]) -> None:
        """Steps that the recipe no longer has."""
        names = {step.name for step in steps}
        kept = {name: held for name, held in self.record["steps"].items() if name in names}
        self.record["steps"] = kept


def decide(
    steps: Sequence[Step],
    state: RunState,
    *,
    again_from: str | None = None,
    until: str | None = None,
) -> list[Decision]:
    """What each step up to `until` needs. From the step `again_from` on, all start anew.

    UserError: no such steps, in no such order, or a step before `again_from` that is not done.
    """
    names = [step.name for step in steps]
    for name in (again_from, until):
        if name is not None and name not in names:
            raise UserError(f"no step {name!r} in this run: its steps are {', '.join(names)}")
    if until is not None:
        if again_from is not None and names.index(again_from) > names.index(until):
            raise UserError(f"`from` {again_from} comes after `until` {until}")
        steps = steps[: names.index(until) + 1]
    decisions: dict[str, Decision] = {}
    forced = False
    for step in steps:
        forced = forced or step.name == again_from
        found = _decide(step, state, decisions, forced)
        if again_from is not None and not forced and found.state != "done":
            raise UserError(
                f"`from` {again_from}: the step {step.name} before it is not done ({found.why}): "
                "leave `from` away"
            )
        decisions[step.name] = found
    return list(decisions.values())


def _decide(step: Step, state: RunState, before: Mapping[str, Decision], forced: bool) -> Decision:
    out, stage = state.path.parent, step.stage
    # as the record holds it, or a step with a secret in an option would start again each time
    inputs: dict[str, Any] = plain({"values": _values(stage, out), "read": _identities(stage, out)})
    inputs["after"] = state.made_by(step.after)
    begun = state.begun(step)
    if begun is None:
        return Decision(step, "run", "it never ran", inputs)
    if forced:
        return Decision(step, "run", "from asks for it", inputs)
    upstream = next((before[name] for name in step.after if before[name].state != "done"), None)
    if upstream is not None:
        verb = "runs again" if upstream.state == "run" else "goes on"
        return Decision(step, "run", f"{upstream.step.name} {verb}", inputs)
    change = _change(begun["inputs"], inputs)
    if change is not None:
        return Decision(step, "run", change, inputs)
    if begun["status"] == "done":
        gone = next((path for path in stage.writes if not path.exists()), None)
        if gone is not None:
            return Decision(step, "run", f"{gone} is gone", inputs)
        return Decision(step, "done", "", inputs)
    why = "it failed" if begun["status"] == "failed" else "it was stopped"
    goes_on = stage.continues and not (begun["status"] == "failed" and _is_finished(stage))
    return Decision(step, "continue" if goes_on else "run", why, inputs)


def _is_finished(stage: Stage) -> bool:
    """Whether a failed stage came to its end: a training that diverged can only begin again."""
    try:
        return stage.record_file is not None and bool(read_json(stage.record_file)["finished"])
    except (UserError, KeyError):
        return False


def _values(stage: Stage, out: Path) -> dict[str, str]:
    """What decides the result, by the names of fields. The output folder may be written otherwise,
    or have been moved."""
    found = {}
    for name, value in flat(stage.identity()).items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is not None:
            found[name] = text.replace(str(out), "OUT")
    return found


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference in words. What can no longer be read counts as it was."""
    other = difference(before["values"], now["values"])
    if other is not None:
        return other
    for name, identity in sorted(now["read"].items()):
        if identity is not None and before["read"].get(name) != identity:
            return f"{name} has changed"
    for name, made in sorted(now["after"].items()):
        if before["after"].get(name) != made:
            return f"{name} has run again"
    return None


def _identities(stage: Stage, out: Path) -> dict[str, str | None]:
    """Of everything that a stage reads from outside of the run; None for what is not there, of
    which the stage itself tells if it has to run."""
    found: dict[str, str | None] = {}
    for text in stage.marked(Mark.SOURCE):
        try:
            found[text] = digest(plain(open_source(text).fingerprint()))[:16]
        except UserError:
            found[text] = None
    for name in stage.marked(Mark.FILE):
        # a data set on the Hub goes by its name
        on_hub = None if looks_like_path(name, suffixes=SUFFIXES) else name
        found["data"] = file_hash(Path(name))[:16] if Path(name).is_file() else on_hub
    for name in stage.marked(Mark.MODEL):
        if not Path(name).is_relative_to(out):
            found[name] = _folder_identity(Path(name), MODEL_FILES) or name
    for name in stage.marked(Mark.FOLDER):
        found[name] = _folder_identity(Path(name), None)
    return found


def _folder_identity(folder: Path, suffixes: tuple[str, ...] | None) -> str | None:
    """Names, sizes and times of the files in a folder, of all or of some suffixes; None where there
    is no such folder."""
    if not folder.is_dir():
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if suffixes is None or path.suffix in suffixes]
    states = [(str(path.relative_to(folder)), path.stat()) for path in kept]
    return digest([(name, found.st_size, found.st_mtime_ns) for name, found in states])[:16]
