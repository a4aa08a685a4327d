"""Searches that really run: rounds through the workers, what a restart repeats, what is refused."""

import json
import subprocess
import time
from pathlib import Path

import pytest

import processes
from capgap.artifact import read_json
from capgap.config import parse_recipe
from capgap.errors import UserError
from capgap.records import read_records
from capgap.sweep.plan import Plan, make_plan
from capgap.sweep.recipe import SearchSettings
from capgap.sweep.search import GridSearch, grid_of, sub_plan, with_rungs
from test_docs import assert_told, keys

TOML = """
name = "tiny"
seeds = [0, 1]
scoring_tokens = 512
[corpus]
source = "{source}"
vocabulary = 300
window = 16
heldout_fraction = 0.1
heldout_tokens = 1000
[teachers]
sizes = ["14k", "20k", "28k"]
tokens = 2560
[students]
sizes = ["8k", "11k"]
tokens = [2304]
[training]
batch_tokens = 256
[run]
workers = 2
device = "cpu"
checkpoint_seconds = 0.05
checkpoint_share = 0.9
"""


def command(folder: Path, out: Path, *options: object) -> list[str]:
    recipe = str(folder / "tiny.toml")
    asked = ("--budget", "0.7", "--rungs", "2", "--out", out, *options)
    return ["search", recipe, *map(str, asked)]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments, main=processes.capgap_without_pictures)


@pytest.fixture(scope="module")
def searched(text_file, tmp_path_factory):
    """(folder of the recipe and of `out`, the JSON the command printed, its standard error)."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "tiny.toml").write_text(TOML.format(source=text_file))
    done = run(command(folder, folder / "out", "--json"))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_a_search_writes_what_a_sweep_writes_and_its_trace(searched):
    folder, printed, errors = searched
    out = folder / "out"
    for name in ("grid.csv", "law.json", "report.html", "sweep.json", "search.json"):
        assert (out / name).stat().st_size > 100, name
    trace = read_json(out / "search.json")
    assert_told(trace, keys("output.md", "`search.json`"))
    assert_told({"search": printed["search"]}, keys("cli.md", "`--json` of search"))
    assert printed["search"]["choices"] == trace["choices"]
    assert [one["student_size"] for one in trace["choices"]] == [8_000, 11_000]
    assert trace["rungs"] == [768, 2304]
    assert trace["stop"] in ("safe", "budget")
    assert printed["student"] == str(out / "student")
    assert "round 1: start" in errors
    fractions = [step["spent_fraction"] for step in trace["steps"]]
    assert fractions == sorted(fractions)
    assert fractions[-1] == trace["spent_fraction"] <= 0.7
    assert trace["spent_flops"] == sum(step["flops"] for step in trace["steps"])


def test_the_records_are_those_of_the_trace_and_there_are_no_baselines(searched):
    folder, _, _ = searched
    trace = json.loads((folder / "out" / "search.json").read_text())
    told = {one["id"]: one["loss"] for step in trace["steps"] for one in step["runs"]}
    records = read_records(folder / "out")
    cells = {one.id: one.heldout.loss for one in records if one.kind == "cell"}
    assert cells == told
    assert len(cells) < 2 * 3 * 2 * 2
    assert not [one for one in records if one.kind == "baseline"]
    needed = {one.teacher for one in records if one.kind == "cell"}
    assert {one.id for one in records if one.kind == "teacher"} == needed


def test_the_same_command_again_computes_nothing(searched):
    folder, printed, _ = searched
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("records/*/record.json")}
    again = run(command(folder, folder / "out", "--json", "--quiet"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["search"] == printed["search"]
    found = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("records/*/record.json")}
    assert found == stamps


def test_killed_and_continued_equals_uninterrupted(searched, tmp_path):
    folder, printed, _ = searched
    asked = command(folder, tmp_path / "out", "--json")
    process = processes.Started(*asked, main=processes.capgap_without_pictures)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "search.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes.kill_alone(process)
    kept = {
        path.parent.name: path.stat().st_mtime_ns
        for path in (tmp_path / "out").glob("records/*/record.json")
    }
    done = run(asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["search"] == printed["search"]
    for name, stamp in kept.items():
        assert (tmp_path / "out/records" / name / "record.json").stat().st_mtime_ns == stamp
    whole = {record.id: record for record in read_records(folder / "out")}
    found = {record.id: record for record in read_records(tmp_path / "out")}
    assert found.keys() == whole.keys()
    assert all(record.heldout == whole[name].heldout for name, record in found.items())


def test_another_recipe_and_other_rungs_are_refused_in_the_same_folder(searched):
    folder, _, _ = searched
    for change, key in (
        (("--set", "seeds=[0, 1, 3]"), "seeds"),
        (("--rungs", "1"), "students.tokens"),
    ):
        refused = run([*command(folder, folder / "out"), *change])
        assert refused.returncode == 2
        assert f"another recipe (tiny): {key} is [" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_costs_are_those_of_the_plan(tiny_recipe):
    for inits in (["pruned"], ["fixed"], ["scratch"]):
        students = tiny_recipe["students"] | {"tokens": [4608], "inits": inits}
        recipe = parse_recipe(tiny_recipe | {"students": students, "seeds": [0, 1]})
        plan = make_plan(with_rungs(recipe, 2))
        grid, cells = grid_of(plan)
        asked = make_plan(recipe)
        assert grid.full_flops == sum(asked.flops(()).values())
        first = [run for run in cells if run.teacher in (1, 2) and run.student == 0]
        second = [run for run in cells if run.teacher == 2 and run.student == 1]
        one, both = (
            sub_plan(plan, [cells[run] for run in runs], label="round1")
            for runs in (first, first + second)
        )
        assert grid.flops(first) == sum(one.flops(()).values())
        alone = Plan(
            plan.recipe, (), sub_plan(plan, [cells[r] for r in second], label="x").columns, ()
        )
        assert grid.flops(second, before=first) == sum(alone.flops(()).values())
        assert grid.flops(first + second) == sum(both.flops(()).values())


def test_rungs_are_thirds_in_whole_batches(tiny_recipe):
    tiny_recipe["students"]["tokens"] = [23_040]
    recipe = with_rungs(parse_recipe(tiny_recipe), 3)
    assert {cell.budget for cell in make_plan(recipe).cells} == {2560, 7680, 23_040}


def test_what_a_search_cannot_look_at_is_refused(tiny_recipe):
    def search(**changes):
        data = tiny_recipe | {name: tiny_recipe.get(name, {}) | v for name, v in changes.items()}
        return GridSearch(parse_recipe(data), SearchSettings(budget=0.7, rungs=2))

    with pytest.raises(UserError, match=r"one init.*not at pruned, fixed.*`set`"):
        search(students={"inits": ["pruned", "fixed"]})
    with pytest.raises(UserError, match=r"one token budget, not at 2\.56k, 5\.12k"):
        search(students={"tokens": [2560, 5120]})
    with pytest.raises(UserError, match=r"rungs 2: the shortest.*fewer rungs"):
        search(students={"tokens": [256]})
    with pytest.raises(UserError, match="two teachers or more"):
        search(teachers={"sizes": ["20k"]})


def test_mistakes_are_told_in_one_line(typed, tmp_path, text_file):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TOML.format(source=text_file))
    for options, told in (
        (("--budget", "35"), "--budget '35': Input should be less than or equal to 1"),
        (("--budget", "0.001"), "too small for this grid"),
        (("--rungs", "0"), "--rungs '0': Input should be greater than or equal to 1"),
    ):
        answer = typed("search", recipe, *options, "--out", tmp_path / "out")
        assert answer.code == 2
        assert told in answer.err
        assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_budget_and_the_first_runs(typed, tmp_path, text_file):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TOML.format(source=text_file))
    found = json.loads(typed("search", recipe, "--budget", "0.7", "--dry-run", "--json").out)
    assert_told(found, keys("cli.md", "`--json` of a search's dry run"))
    assert found["cells"] == 12
    assert found["budget_flops"] == pytest.approx(0.7 * found["full_flops"], rel=1e-6)
    assert 0 < found["first_flops"] < found["budget_flops"]
    assert all(name.startswith("llama-s") for name in found["first"])
    assert "the full grid has 12 cells" in typed("search", recipe, "--dry-run").out
