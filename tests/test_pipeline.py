"""The steps of a run: what they are, which have to run and why, how they end."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import typer

import processes
from capgap.cli import app
from capgap.config import find_recipe, load_any_recipe
from capgap.errors import UserError
from capgap.pipeline import runner
from capgap.pipeline.state import RunState, decide
from capgap.pipeline.steps import Step, plan_steps
from capgap.stage import Stage, settings
from capgap.stages.cache import Cache
from capgap.stages.distill import Distill
from capgap.stages.prune import Prune
from capgap.stopping import Signals, Stopped

ROOT = Path(__file__).parent.parent
ALL = [
    "teacher-corpus",
    "teacher",
    "adapt",
    "corpus-code",
    "corpus-english",
    "score",
    "prune",
    "distill",
    "evaluate",
    "instruct",
    "prefer",
    "evaluate-final",
    "export",
]


CODE, ENGLISH = ROOT / "src/capgap/law", ROOT / "docs"
# the recipe's own are Python's whole library
TEXTS = (
    f'teacher.source="{CODE}"',
    f'adapt.source="{ENGLISH}"',
    f'adapt.old="{CODE}"',
    f'corpus=[{{name="code", source="{CODE}", weight=0.7}}, '
    f'{{name="english", source="{ENGLISH}", weight=0.3}}]',
)


def tiny(*overrides):
    return load_any_recipe(find_recipe("minima-tiny"), (*TEXTS, *overrides))


def mark_done(steps, state):
    """As if every step had run."""
    for decision in decide(steps, state):
        step = decision.step
        inputs = decision.inputs | {"after": state.made_by(step.after)}
        state.keep(step, id=step.name, inputs=inputs, status="done", result="")
        for path in step.stage.writes:
            path.mkdir(parents=True, exist_ok=True)


@pytest.fixture
def done(tmp_path):
    """A run of which all is done, and its folder."""
    steps = plan_steps(tiny(), tmp_path)
    mark_done(steps, RunState(tmp_path, "minima-tiny"))
    return tmp_path


def states(recipe, out, **options):
    found = decide(plan_steps(recipe, out), RunState(out, recipe.name), **options)
    return {one.step.name: one.state for one in found}, {one.step.name: one.why for one in found}


def test_the_steps_of_the_whole_pipeline(tmp_path):
    steps = plan_steps(tiny(), tmp_path)
    assert [step.name for step in steps] == ALL
    known = set()
    for step in steps:
        assert set(step.after) <= known
        known.add(step.name)


@pytest.mark.parametrize("name", ["minima-tiny", "minima-3b"])
def test_every_command_line_is_one_that_capgap_takes(name, tmp_path):
    commands = typer.main.get_command(app).commands
    recipe = load_any_recipe(find_recipe(name))
    for section in ("instruct", "prefer"):
        # these need not exist for the command line to be right
        assert getattr(recipe, section) is not None
    for step in plan_steps(recipe, tmp_path):
        name, *words = step.stage.command()
        context = commands[name].make_context(name, words, resilient_parsing=False)
        assert not context.args


def test_the_paper_s_run_without_data_is_planned_by_steps(tmp_path):
    steps = plan_steps(load_any_recipe(find_recipe("minima-3b")), tmp_path)
    by_name = {step.name: step for step in steps}
    assert "teacher" not in by_name
    assert by_name["adapt"].stage.model == "meta-llama/Llama-2-7b-hf"
    assert by_name["prune"].stage.command()[-1] == "hidden=3072,heads=24,ffn=8192,layers=24"
    assert by_name["distill"].stage.command().count("--corpus") == 3


def test_a_recipe_without_text_says_so(tmp_path):
    recipe = tiny().model_copy(update={"corpus": ()})
    with pytest.raises(UserError, match=r"has no \[\[corpus\]\]"):
        plan_steps(recipe, tmp_path)


def test_nothing_runs_twice(done):
    assert set(states(tiny(), done)[0].values()) == {"done"}


def test_a_change_runs_its_step_and_what_follows(done):
    found, why = states(tiny("prune.keep=0.5"), done)
    first = ALL.index("prune")
    assert [found[name] for name in ALL[:first]] == ["done"] * first
    assert {found[name] for name in ALL[first:]} == {"run"}
    assert why["prune"] == "keep is 0.5, was 0.4"
    assert why["distill"] == "prune runs again"


def test_a_change_at_the_end_leaves_the_rest(done):
    found, why = states(tiny("prefer.beta=0.2"), done)
    assert [name for name in ALL if found[name] == "run"] == ["prefer", "evaluate-final", "export"]
    assert why["prefer"] == "beta is 0.2, was 0.1"


def test_changed_conversations_are_noticed(tmp_path):
    data = tmp_path / "conversations.jsonl"
    data.write_text('["a", "b"]\n')
    recipe = tiny(f'instruct.data="{data}"')
    steps = plan_steps(recipe, tmp_path / "out")
    mark_done(steps, RunState(tmp_path / "out", "minima-tiny"))
    data.write_text('["a", "c"]\n')
    found, why = states(recipe, tmp_path / "out")
    assert why["instruct"] == "data has changed"
    assert found["distill"] == "done"
    # another name, or a file that is gone: what was made out of it stays
    data.write_text('["a", "b"]\n')
    data = data.rename(tmp_path / "talks.jsonl")
    assert states(tiny(f'instruct.data="{data}"'), tmp_path / "out")[0]["instruct"] == "done"
    data.unlink()
    assert states(recipe, tmp_path / "out")[0]["instruct"] == "done"
    # a data set on the Hub is another
    assert states(tiny('instruct.data="owner/talks"'), tmp_path / "out")[1]["instruct"] == (
        "data has changed"
    )


def test_a_stopped_step_goes_on_where_its_command_can(done):
    state = RunState(done, "minima-tiny")
    by_name = {step.name: step for step in plan_steps(tiny(), done)}
    state.keep(by_name["distill"], status="stopped")
    found, why = states(tiny(), done)
    assert (found["distill"], why["distill"]) == ("continue", "it was stopped")
    assert (found["evaluate"], why["evaluate"]) == ("run", "distill goes on")
    # what was made out of an unfinished one is not done
    state.keep(by_name["prune"], status="running")
    assert states(tiny(), done)[0]["prune"] == "run"


def test_what_was_deleted_is_made_again(done):
    folder = next(s for s in plan_steps(tiny(), done) if s.name == "prune").stage.writes[0]
    folder.rmdir()
    found, why = states(tiny(), done)
    assert (found["prune"], why["prune"]) == ("run", f"{folder} is gone")


def test_from_and_until(done):
    found, why = states(tiny(), done, again_from="instruct")
    assert [name for name in ALL if found[name] == "run"] == ALL[ALL.index("instruct") :]
    assert why["instruct"] == "from asks for it"
    selected = runner.plan_pipeline(tiny(), done, until="prune")
    assert selected[-1].step.name == "prune"
    with pytest.raises(UserError, match="no step 'prun' in this run: its steps are teacher-corpus"):
        states(tiny(), done, again_from="prun")
    with pytest.raises(UserError, match="the step teacher-corpus before it is not done"):
        states(tiny(), done / "new", again_from="prune")


def test_dry_run_tells_commands(typed, tmp_path):
    found = typed("run", "minima-tiny", "--out", str(tmp_path / "out"), "--dry-run")
    assert found.code == 0, found.err
    assert "1. teacher-corpus: would run (it never ran)" in found.out
    assert "   capgap distill " in found.out
    assert not (tmp_path / "out").exists()
    told = typed("run", "minima-tiny", "--out", str(tmp_path / "out"), "--dry-run", "--json")
    assert [one["step"] for one in json.loads(told.out)["steps"]] == ALL


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["run", "laptop"], "laptop is the recipe of a sweep, not of a run: see `capgap sweep`"),
        (["run", "minima-tiny", "--until", "disti"], "no step 'disti' in this run"),
        (["run", "minima-tiny", "-s", "adapt.peices=3"], "did you mean 'pieces'?"),
        (["run", "minima-tiny", "-s", "teacher.model=x"], "give either model (a name or folder)"),
        (
            ["run", "minima-tiny", "--until", "score", "--from", "prune"],
            "--from prune comes after --until score",
        ),
    ],
)
def test_a_mistake_is_one_line(asked, line, typed, tmp_path):
    found = typed(*asked, "--out", str(tmp_path / "out"))
    assert found.code == 2
    assert line in found.err
    assert "Traceback" not in found.err


def test_a_foreign_folder_is_left_alone(typed, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    found = typed("run", "minima-tiny", "--out", str(tmp_path))
    assert found.code == 2
    assert "holds something else" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_step_s_mistake_ends_the_run_with_its_line(tmp_path):
    """The corpus that the teacher should be trained on is too short for a window."""
    text = tmp_path / "short.txt"
    text.write_text("too short\n")
    arguments = ["run", "minima-tiny", "--out", str(tmp_path / "out"), "-s"]
    found = processes.run(*arguments, f'teacher.source="{text}"')
    assert found.returncode == 2
    lines = found.stderr.strip().splitlines()
    assert lines[-1].startswith("capgap: ")
    assert "Traceback" not in found.stderr
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    assert kept["teacher-corpus"]["status"] == "failed"


def test_a_stopped_run_keeps_what_is_done(tmp_path):
    """SIGTERM while a step is at work: the step stops first, then the run."""
    out = tmp_path / "out"
    process = processes.Started("run", "minima-tiny", "--out", out)
    try:
        deadline = time.monotonic() + 120
        while not (out / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in told
    kept = json.loads((out / "run.json").read_text())["steps"]
    assert kept["teacher-corpus"]["status"] in ("stopped", "failed", "done")
    assert Path(out, ".lock").exists()


def test_what_rests_on_an_earlier_start_runs_again(done):
    """Distilled anew and stopped, then gone on to its end: evaluations and tuning are of the old
    student."""
    state = RunState(done, "minima-tiny")
    by_name = {step.name: step for step in plan_steps(tiny(), done)}
    state.keep(by_name["distill"], id="anew", status="done")
    found, why = states(tiny(), done)
    assert (found["evaluate"], why["evaluate"]) == ("run", "distill has run again")
    assert found["prune"] == "done"
    assert {found[name] for name in ALL[ALL.index("evaluate") :]} == {"run"}


def test_how_a_step_is_carried_out_does_not_count(done):
    changed = tiny("run.checkpoint_seconds=60", "run.device=cpu", 'track=["tensorboard"]')
    assert set(states(changed, done)[0].values()) == {"done"}
    assert set(states(tiny("evaluate.batch_size=2"), done)[0].values()) == {"done"}


def test_a_run_may_be_moved(done):
    moved = done.rename(done.with_name("moved"))
    assert set(states(tiny(), moved)[0].values()) == {"done"}


def test_sets_that_came_later_are_evaluated(tmp_path):
    sets = tmp_path / "sets"
    sets.mkdir()
    recipe = tiny(f'evaluate.data="{sets}"', 'evaluate.tasks=["piqa"]')
    steps = plan_steps(recipe, tmp_path / "out")
    mark_done(steps, RunState(tmp_path / "out", "minima-tiny"))
    (sets / "piqa.tar.xz").write_text("a set")
    found, why = states(recipe, tmp_path / "out")
    assert (found["evaluate"], why["evaluate"]) == ("run", f"{sets} has changed")
    assert found["distill"] == "done"


def test_a_training_that_failed_for_good_begins_again(done):
    state = RunState(done, "minima-tiny")
    distill = next(step for step in plan_steps(tiny(), done) if step.name == "distill")
    state.keep(distill, status="failed")
    assert states(tiny(), done)[0]["distill"] == "continue"
    distill.stage.record_file.write_text('{"finished": true}')
    assert states(tiny(), done)[0]["distill"] == "run"


def test_another_run_s_folder_is_refused(done, typed):
    recipe = done / "other.toml"
    text = find_recipe("minima-tiny").read_text()
    recipe.write_text(text.replace('name = "minima-tiny"', 'name = "other"'))
    found = typed("run", str(recipe), "--out", str(done))
    assert found.code == 2
    assert "holds the run 'minima-tiny', not 'other': choose another folder" in found.err


def test_the_paper_s_run_is_shown_without_its_texts(typed, tmp_path):
    found = typed("run", "minima-3b", "--out", str(tmp_path / "out"), "--dry-run")
    assert found.code == 0, found.err
    assert re.search(r"capgap adapt meta-llama/Llama-2-7b-hf .*--new ", found.out)
    # a published name alone is enough, where its family is known
    named = typed("run", "minima-tiny", "-s", "teacher={model='Llama-2-7B'}", "--dry-run")
    assert "capgap adapt meta-llama/Llama-2-7b-hf " in named.out


@pytest.mark.parametrize("name", ["minima-tiny", "minima-3b"])
def test_a_stage_is_its_command(name, tmp_path):
    """What a stage's command line says is that stage again."""
    for step in plan_steps(load_any_recipe(find_recipe(name)), tmp_path):
        assert read_back(step.stage) == step.stage


def test_odd_values_are_in_the_command():
    folders = {"out": Path("o"), "corpus": [("a", 1 / 3), ("b", 2 / 3)]}
    training = {"ignored_tokens": ["😀", 'a"b'], "micro_batch_tokens": None, "betas": [0.8, 0.9]}
    for stage in (
        Cache(teacher="t", part="2/4", document_mask=True, **folders),
        Distill(teacher="t", students=["s"], tokens=4096, training=training, **folders),
        Prune(teacher="t", out=Path("o"), shape={"hidden": 64, "layers": 2}, dry_run=True),
    ):
        assert read_back(stage) == stage


def read_back(stage):
    """A stage from its own words."""
    name, *words = stage.command()
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, words).params
    quiet, as_json = given.pop("quiet"), given.pop("json_")
    assert not quiet
    assert not as_json
    sections = settings(type(stage), given.pop("set_", None) or [])
    return type(stage)(**{key: one for key, one in given.items() if one is not None}, **sections)


@pytest.mark.parametrize("when", ["told", "finishing"])
def test_a_signal_between_steps_stops_the_run(tmp_path, monkeypatch, when):
    """One that comes too late for the step at work keeps what it did, and starts no other."""

    class Kept(Stage):
        out: Path

        def run(self, *, say, should_stop):
            self.out.mkdir()
            if when == "finishing":
                signal.raise_signal(signal.SIGTERM)
            return {}

        def told(self, found):
            if when == "told":
                signal.raise_signal(signal.SIGTERM)
            return ""

    steps = [Step(name, Kept(out=tmp_path / "out" / name)) for name in ("first", "second")]
    monkeypatch.setattr(runner, "plan_steps", lambda recipe, out: steps)
    with pytest.raises(Stopped) as stopped:
        runner.run_pipeline(tiny(), tmp_path / "out")
    assert stopped.value.number == signal.SIGTERM
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    assert {name: one["status"] for name, one in kept.items()} == {"first": "done"}


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)
