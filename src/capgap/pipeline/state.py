"""What of a run is done, and what has to run (again), with the reason in words."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capgap.corpus.sources import open_source
from capgap.errors import UserError
from capgap.pipeline.steps import Step
from capgap.records import write_json_atomically
from capgap.scrub import scrub

RECORD = "run.json"
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
        found = _read(self.path)
        self.record: dict[str, Any] = found or {"schema": 1, "name": name, "steps": {}}
        self.record["name"] = name

    def begun(self, step: Step) -> dict[str, Any] | None:
        """What is known of a step, None where it never ran."""
        found: dict[str, Any] | None = self.record["steps"].get(step.name)
        return found

    def keep(self, step: Step, **values: Any) -> None:
        """Adds to what is known of a step, and writes it down."""
        self.record["steps"].setdefault(step.name, {}).update(values)
        write_json_atomically(self.path, self.record)

    def forget_others(self, steps: Sequence[Step]) -> None:
        """Steps that the recipe no longer has."""
        names = {step.name for step in steps}
        kept = {name: held for name, held in self.record["steps"].items() if name in names}
        self.record["steps"] = kept


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no record of a run ({error}): choose another --out") from None
    return found


def decide(
    steps: Sequence[Step], state: RunState, *, again_from: str | None = None
) -> list[Decision]:
    """What each step needs. From the step `again_from` on, all start anew.

    UserError: no such step, or one before it that is not done; a text or file that is not there,
    unless an earlier step has still to make it.
    """
    names = [step.name for step in steps]
    if again_from is not None:
        check_step(again_from, names)
    decisions: dict[str, Decision] = {}
    forced = False
    for step in steps:
        forced = forced or step.name == again_from
        found = _decide(step, state, decisions, forced)
        if again_from is not None and not forced and found.state != "done":
            raise UserError(
                f"--from {again_from}: the step {step.name} before it is not done ({found.why}): "
                "leave --from away"
            )
        decisions[step.name] = found
    return list(decisions.values())


def check_step(name: str, names: Sequence[str]) -> None:
    """UserError where the run has no such step."""
    if name not in names:
        raise UserError(f"no step {name!r} in this run: its steps are {', '.join(names)}")


def _decide(step: Step, state: RunState, before: Mapping[str, Decision], forced: bool) -> Decision:
    # as the record holds it, or a step with a secret in an option would start again each time
    inputs: dict[str, Any] = scrub({"options": _options(step), "read": _identities(step)})
    inputs["after"] = {name: _digest(before[name].inputs) for name in step.after}
    begun = state.begun(step)
    if begun is None:
        return Decision(step, "run", "it never ran", inputs)
    if forced:
        return Decision(step, "run", "--from asks for it", inputs)
    upstream = next((name for name in step.after if before[name].state == "run"), None)
    change = _change(begun["inputs"], inputs)
    if upstream is not None:
        return Decision(step, "run", f"{upstream} runs again", inputs)
    if change is not None:
        return Decision(step, "run", change, inputs)
    if begun["status"] == "done":
        gone = next((path for path in step.writes if _must_exist(step, path)), None)
        if gone is not None:
            return Decision(step, "run", f"{gone} is gone", inputs)
        return Decision(step, "done", "", inputs)
    why = "it failed" if begun["status"] == "failed" else "it was stopped"
    return Decision(step, "continue" if step.is_continued else "run", why, inputs)


def _must_exist(step: Step, path: Path) -> bool:
    """Whether a step that is done lacks this; the GGUF of an export may not have been asked for."""
    asked = {str(value) for value in step.options.values()}
    return str(path) in asked and not path.exists()


def _options(step: Step) -> dict[str, Any]:
    """The command line by option, as JSON gives it back."""
    told: dict[str, Any] = {"arguments": list(step.arguments)}
    for name, value in step.options.items():
        if value is None or value is False:
            continue
        told[name] = [str(one) for one in value] if isinstance(value, tuple) else str(value)
    return told


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference in words."""
    old, new = before["options"], now["options"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} is {_shown(new.get(name))}, before it was {_shown(old.get(name))}"
    for name in sorted(before["read"].keys() | now["read"].keys()):
        if before["read"].get(name) != now["read"].get(name):
            return f"{name} has changed"
    for name in sorted(before["after"].keys() | now["after"].keys()):
        if before["after"].get(name) != now["after"].get(name):
            return f"{name} has changed"
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(value) if isinstance(value, list) else str(value)


def _identities(step: Step) -> dict[str, str]:
    """Of everything that a step reads from outside of the run."""
    found = {text: _digest(open_source(text).fingerprint()) for text in step.texts}
    for name in step.files:
        try:
            with Path(name).open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        except OSError as error:
            raise UserError(f"{step.name}: cannot read {name}: {error.strerror}") from None
    for name in step.models:
        found[name] = _model_identity(name)
    return found


def _model_identity(name: str) -> str:
    """Names, sizes and times of a folder's files; a model of the Hub is its name."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return _digest([(path.name, *_size_and_time(path)) for path in files])


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
