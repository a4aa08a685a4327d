"""Chains: an assistant between teacher and student, at the FLOPs of the direct cut."""

import functools
import json
import time

import pytest

import processes
from capgap.config import parse_recipe
from capgap.errors import UserError
from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.prune import scoring_flops
from capgap.records import read_records
from capgap.sweep.plan import make_plan

run = functools.partial(processes.run, main=processes.capgap_without_pictures)
CHAINS = {"sizes": ["8k"], "tokens": [51_200], "inits": ["pruned", "chain"]}


def plan_of(data, **changes):
    return make_plan(parse_recipe(data | changes))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_chain_has_the_flops_of_the_direct_cut(tiny_recipe, share):
    plan = plan_of(tiny_recipe, students=CHAINS | {"assistant_share": share})
    direct = {cell.teacher.size: cell for cell in plan.cells if cell.init == "pruned"}
    chains = [cell for cell in plan.cells if cell.init == "chain"]
    assert len(chains) == len(direct) == 4
    for cell in chains:
        other = direct[cell.teacher.size]
        assert (cell.budget, other.budget, other.tokens) == (51_200,) * 3
        ours, theirs = (sum(one.work.flops(plan.recipe, 0).values()) for one in (cell, other))
        assert ours == pytest.approx(theirs, rel=0.02)  # half a batch of either leg
        above, between, own = (
            one.shape.parameters() for one in (cell.teacher, cell.assistant, cell)
        )
        middle = (above.non_embedding * other.shape.parameters().non_embedding) ** 0.5
        assert between.non_embedding == pytest.approx(middle, rel=0.01)
        assert own.non_embedding == pytest.approx(8000, rel=0.01)
        first = cell.assistant.tokens * (6 * between.total + 2 * above.total)
        assert first == pytest.approx(share * theirs, rel=0.03)
        # by part, by hand
        tokens = plan.recipe.scoring_tokens
        flops = cell.work.flops(plan.recipe, 0)
        assert flops["student"] == 6 * (
            between.total * cell.assistant.tokens + own.total * cell.tokens
        )
        assert flops["teacher_forward"] == 2 * (
            above.total * cell.assistant.tokens + between.total * cell.tokens
        )
        assert flops["pruning"] == scoring_flops(
            "activation", None, above.total + between.total, tokens
        )


def test_chains_are_counted_once_in_the_whole(tiny_recipe):
    plan = plan_of(tiny_recipe, students=CHAINS)
    alone = [cell.work.flops(plan.recipe, plan.recipe.corpus.heldout_tokens) for cell in plan.cells]
    whole = plan.flops([])
    for part in ("student", "teacher_forward"):
        assert whole[part] == sum(flops[part] for flops in alone)
    assistants = [cell.assistant for cell in plan.cells if cell.assistant is not None]
    scored = [one.shape.parameters().total for one in (*plan.teachers, *assistants)]
    assert whole["pruning"] == sum(2 * total * plan.recipe.scoring_tokens for total in scored)


def test_a_baseline_waits_for_the_assistant_it_starts_from(tiny_recipe):
    plan = plan_of(tiny_recipe, students=CHAINS)
    made = {column.assistant.id: column for column in plan.columns if column.assistant is not None}
    waiting = [
        (column, cell)
        for column in plan.baselines
        for cell in column.cells
        if cell.assistant is not None
    ]
    assert len(waiting) == len(made) == 4
    for column, cell in waiting:
        assert made[cell.assistant.id].id in column.needs
        assert column.assistant is None
        assert cell.alpha == 0


def test_too_few_tokens_for_a_chain(tiny_recipe):
    with pytest.raises(UserError, match="too few for the chain"):
        plan_of(tiny_recipe, students=CHAINS | {"tokens": [512]}, scoring_tokens=8192)


RECIPE = """
name = "chains"
scoring_tokens = 512
[corpus]
source = "{source}"
vocabulary = 300
window = 16
heldout_fraction = 0.1
heldout_tokens = 1000
[teachers]
sizes = ["14k", "28k"]
tokens = 5120
[students]
sizes = ["8k"]
tokens = [5120]
inits = ["pruned", "chain"]
[training]
batch_tokens = 256
[run]
workers = 2
device = "cpu"
checkpoint_seconds = 0.05
checkpoint_share = 0.9
"""


def command(recipe, out):
    return ["sweep", str(recipe), "--out", str(out), "--json"]


def test_a_sweep_with_chains_killed_and_continued(text_file, tmp_path):
    recipe = tmp_path / "chains.toml"
    recipe.write_text(RECIPE.format(source=text_file))
    whole = run(*command(recipe, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)["verdict"]
    records = {record.id: record for record in read_records(tmp_path / "whole")}
    chains = [r for r in records.values() if r.init == "chain" and r.kind == "cell"]
    assert len(chains) == 2
    for record in chains:
        between = record.assistant
        assert record.parameters.total < between.parameters.total
        assert between.parameters.total < record.teacher_parameters.total
        assert between.loss < between.after_cut
        assert record.heldout.loss < record.after_cut.loss
        assert record.tokens == 5120
        baseline = records[f"baseline-{record.id}"]
        assert baseline.after_cut == record.after_cut
        direct = records[record.id.replace("chain", "pruned")]
        assert record.flops.total == pytest.approx(direct.flops.total, rel=0.1)  # whole batches

    process = processes.Started(
        *command(recipe, tmp_path / "again"), main=processes.capgap_without_pictures
    )
    deadline = time.monotonic() + 120
    # in the middle of a chain
    while not list((tmp_path / "again").glob("work/assistants/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes.kill_alone(process)
    done = run(*command(recipe, tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    again = {record.id: record for record in read_records(tmp_path / "again")}
    assert again.keys() == records.keys()
    for name, record in again.items():
        assert record.heldout == records[name].heldout
        assert record.assistant == records[name].assistant


def test_a_chain_whose_teacher_fails_is_recorded(text_file, tmp_path):
    recipe = tmp_path / "chains.toml"
    text = RECIPE.format(source=text_file).replace(
        "= 5120\n[st", "= 5120\nlearning_rate = 1e12\n[st"
    )
    recipe.write_text(text)
    done = run(*command(recipe, tmp_path / "out"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    records = read_records(tmp_path / "out")
    chains = [record for record in records if record.init == "chain"]
    assert len(chains) == 4
    for record in chains:
        assert record.status == "failed"
        assert "its teacher" in record.failure.message
    assert fit(cells_of(records), draws=100).excluded


def test_a_chain_whose_assistant_fails_is_recorded(text_file, tmp_path):
    recipe = tmp_path / "chains.toml"
    text = RECIPE.format(source=text_file).replace('"chain"]', '"chain"]\nlearning_rate = 1e12')
    recipe.write_text(text)
    done = run(*command(recipe, tmp_path / "out"))
    assert done.returncode == 1
    chains = [one for one in read_records(tmp_path / "out") if one.init == "chain"]
    assert len(chains) == 4
    for record in chains:
        assert "its assistant failed: non-finite" in record.failure.message
        assert record.assistant.loss is None
