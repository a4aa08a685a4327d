"""Runs the steps of a recipe one after the other, and keeps what became of them."""

import gc
import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capgap.artifact import LOCK, check_empty, locked, read_json
from capgap.errors import Failed
from capgap.pipeline.recipe import RunRecipe
from capgap.pipeline.state import RECORD, Decision, RunState, decide
from capgap.pipeline.steps import Step, plan_steps
from capgap.sizes import clock_time
from capgap.stage import Say
from capgap.stages.distill import TrainingStage
from capgap.stopping import Signals, Stopped
from capgap.train.trackers import gather_trackers


class StepFailed(Failed):
    """A step came to no good end; what came before it is kept in `out`. A process of its own has
    said why, where `why` is empty."""

    def __init__(self, step: str, why: str, code: int, out: Path) -> None:
        reason = f": {why}" if why else ""
        super().__init__(f"the step {step} failed{reason}; what is done is kept in {out}")
        self.code = code


def plan_pipeline(
    recipe: RunRecipe, out: Path, *, again_from: str | None = None, until: str | None = None
) -> list[Decision]:
    """What `run_pipeline` would do, without doing it."""
    out = out.absolute()
    state = RunState(out, recipe.name)
    return decide(plan_steps(recipe, out), state, again_from=again_from, until=until)


def run_pipeline(
    recipe: RunRecipe,
    out: Path,
    *,
    again_from: str | None = None,
    until: str | None = None,
    quiet: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Runs what is not done or has changed, up to the step `until`; returns run.json.

    A training that several processes share (`hardware.processes`) is one of torchrun's kind, which
    writes to our standard error. UserError: the user's mistakes, an output folder in use; Stopped
    and StepFailed where a step did not end well: the same call goes on.
    """
    # the same folder, wherever the next call is made from
    out = out.absolute()
    if not (out / RECORD).exists():
        check_empty(out, ours=(LOCK, f".{RECORD}."))
    with locked(out) as lock, Signals() as signals:
        state, steps = RunState(out, recipe.name), plan_steps(recipe, out)
        decisions = decide(steps, state, again_from=again_from, until=until)
        state.forget_others(steps)
        state.record["recipe"] = recipe.model_dump(mode="json")
        gather_trackers(recipe.track, out)
        work = _Work(state, signals, recipe.hardware.processes, lock, say, quiet)
        for number, decision in enumerate(decisions, 1):
            head = f"[{number}/{len(decisions)}] {decision.step.name}"
            if decision.state == "done":
                say(f"{head}: done before")
                continue
            signals.check()
            verb = "goes on" if decision.state == "continue" else "starts again"
            never_ran = decision.why == "it never ran"
            say(f"{head}: {'starts' if never_ran else f'{verb}: {decision.why}'}")
            work.run(decision)
            kept = state.begun(decision.step) or {}
            result = f", {kept['result']}" if kept["result"] else ""
            say(f"{head}: {clock_time(kept['seconds'])}{result}")
        signals.check()
        return state.record


@dataclass(frozen=True)
class _Work:
    """Steps at work: the stage of each here, or shared by several processes."""

    state: RunState
    signals: Signals
    processes: int
    lock: int
    say: Say
    quiet: bool

    def run(self, decision: Decision) -> None:
        """Keeps how it ended; raises what ended it."""
        step, state = decision.step, self.state
        anew = decision.state == "run"
        begun = state.begun(step) or {}
        state.keep(
            step,
            status="running",
            # what comes after knows by it whether it rests on this start or on one before
            id=secrets.token_hex(4) if anew else begun["id"],
            inputs=decision.inputs | {"after": state.made_by(step.after)},
            command=["capgap", *step.stage.command()],
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            result=None,
        )
        # after it is kept that nothing is done: half of what was there is nothing either
        for path in (*step.stage.writes, *step.clears) if anew else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        start = time.monotonic()
        status, result = "failed", None
        try:
            is_shared = self.processes > 1 and isinstance(step.stage, TrainingStage)
            result = self._share(step) if is_shared else self._do(step)
            status = "done"
        except Stopped:
            status = "stopped"
            raise
        finally:
            seconds = time.monotonic() - start
            state.keep(step, status=status, seconds=seconds, result=result)

    def _do(self, step: Step) -> str:
        stage = step.stage
        record = self.signals.run(stage, self.say)
        self.say(stage.told(record))
        if stage.failure(record):
            raise StepFailed(step.name, stage.failure(record), 1, self.state.path.parent)
        # what a stage held is for the next one
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return stage.result(record)

    def _share(self, step: Step) -> str:
        words = [sys.executable, "-m", "capgap.pipeline.processes", str(self.processes)]
        code = self.signals.run_process(
            [*words, *step.stage.command(), *(["--quiet"] if self.quiet else [])],
            stdout=sys.stderr.fileno(),
            # a random.py in the working folder is not Python's
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            # should we be killed, nobody else starts beside it
            pass_fds=(self.lock,),
        )
        if code:
            raise StepFailed(step.name, "", code, self.state.path.parent)
        assert step.stage.record_file is not None
        return step.stage.result(read_json(step.stage.record_file))
