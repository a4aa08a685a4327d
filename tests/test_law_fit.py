"""law.json as a whole: its keys, warnings, sentences, errors and speed."""

import dataclasses
import json
import time
from dataclasses import asdict

import numpy as np
import pytest

from capgap.errors import UserError
from capgap.law.fit import fit_law
from capgap.records import TrainingCurve, record_from_dict, write_json_atomically
from law_surface import ladder, sweep

QUIET = {"seed_noise": 0.003, "document_noise": 0.02}


def small(**changes):
    values = {"curvature": 0.05} | QUIET | changes
    return sweep([50_000, 80_000], lambda s: ladder(1.2 * s, 1.5, 6), lambda s: 2.7 * s, **values)


def changed(record, **changes):
    """The same record with other values."""
    return record_from_dict(asdict(record) | changes)


def names(law):
    return {warning["name"] for warning in law["validity"]}


def test_law_json_is_complete_plain_and_repeatable(tmp_path):
    law = fit_law(small())
    write_json_atomically(tmp_path / "law.json", law)
    assert json.loads((tmp_path / "law.json").read_text()) == law == fit_law(small())
    assert law["scale"] == "non_embedding"
    curve = law["curves"][0]
    assert [point["teacher_size"] for point in curve["points"]] == ladder(60_000, 1.5, 6)
    point = curve["points"][2]
    assert point["seeds"] == [0, 1]
    assert point["loss"] == pytest.approx(sum(point["losses"]) / 2)
    # the seed's common shift is no noise of a comparison, nor is the documents' difficulty
    assert point["comparison_stderr"] < 0.01 < point["loss_stderr"]
    assert law["published"][0]["slope"] == 2.498
    assert law["excluded"] == []
    assert names(law) == {"below_baseline"}


def test_gain_over_the_baseline_is_paired():
    law = fit_law(small(seed_noise=0.0, document_noise=0.0))
    point = law["curves"][0]["points"][2]  # 135k, which is 2.7 times the student
    assert point["gain"] == pytest.approx(0.03, abs=1e-9)
    assert point["gain_stderr"] < 1e-9
    assert any("+0.0300 nats" in sentence for sentence in law["verdict"])


def test_missing_and_worse_baselines_are_told():
    law = fit_law(small(gain=None))
    assert law["curves"][0]["points"][0]["gain"] is None
    assert "missing_baseline" in names(law)
    assert any("gain of distilling is unknown" in sentence for sentence in law["verdict"])
    assert "below_baseline" in names(fit_law(small(gain=-0.5)))


def test_a_teacher_worse_than_a_smaller_one_is_told():
    records = small()
    assert "teacher_loss_not_falling" not in names(fit_law(records))
    worst = max(
        (r for r in records if r.kind == "teacher" and r.seed == 1),
        key=lambda record: record.parameters.non_embedding,
    )
    losses = [1.2 * loss for loss in worst.heldout.document_losses]
    raised = changed(worst, heldout=worst.heldout.__dict__ | {"document_losses": losses})
    law = fit_law([raised if record is worst else record for record in records])
    [warning] = [w for w in law["validity"] if w["name"] == "teacher_loss_not_falling"]
    assert warning["where"] == "llama, seed 1"
    assert "729k" in warning["message"]
    assert law["verdict"][-1].startswith("Caution")


def test_one_seed_coarse_spacing_and_few_documents_are_told():
    law = fit_law(
        sweep([50_000], lambda _: ladder(40_000, 2.0, 6), lambda _: 150_000, seeds=1, documents=9)
    )
    assert {"one_seed", "spacing_too_coarse", "few_documents"} <= names(law)
    assert any("one seed" in warning for warning in law["curves"][0]["warnings"])
    fine = sweep([50_000], lambda _: ladder(40_000, 1.6, 6), lambda _: 150_000)
    assert "spacing_too_coarse" not in names(fit_law(fine))


def test_edges_and_few_teachers_are_told():
    edge = sweep([50_000], lambda _: ladder(60_000, 1.5, 6), lambda _: 10_000)
    assert "edge_optimum" in names(fit_law(edge))
    few = sweep([50_000], lambda _: [60_000, 90_000], lambda _: 90_000)
    law = fit_law(few)
    assert "too_few_teachers" in names(law)
    assert law["curves"][0]["fit"] is None


def test_failed_runs_are_listed_and_left_out():
    records = small()
    cell = next(record for record in records if record.kind == "cell")
    why = {"message": "loss is not finite at step 3", "step": 3}
    broken = changed(cell, status="failed", heldout=None, failure=why)
    law = fit_law([broken if record is cell else record for record in records])
    reason = "failed: loss is not finite at step 3"
    assert law["excluded"] == [{"id": cell.id, "reason": reason}]
    assert law["curves"][0]["points"][0]["seeds"] == [1]
    assert "failed_cells" in names(law)


def test_pruned_against_fixed():
    def both(best_when_pruned):
        records = small()
        pruned = sweep(
            [50_000, 80_000],
            lambda s: ladder(1.2 * s, 1.5, 6),
            lambda s: best_when_pruned * s,
            init="pruned",
            number=1,
            **QUIET,
        )
        # the same held-out documents and teachers as in the first sweep
        documents = records[0].heldout.document_tokens
        own = [
            changed(r, heldout=r.heldout.__dict__ | {"document_tokens": documents})
            for r in pruned
            if r.kind != "teacher"
        ]
        return [s for s in fit_law(records + own)["verdict"] if "against fixed" in s]

    assert len(both(2.7)) == 2
    assert all("damage of pruning" in sentence for sentence in both(4.2))


def test_every_finding_is_said_in_plain_words_with_its_number():
    records = sweep(
        [40_000, 80_000, 160_000],
        lambda s: ladder(1.2 * s, 1.3, 9),
        lambda s: 2.5 * s,
        **QUIET,
    )
    text = "\n".join(fit_law(records)["verdict"])
    assert "student 40k: the best teacher has about" in text
    assert "90% interval" in text
    assert "a larger teacher can be worse, beyond noise, for 3 of 3 students" in text
    assert "the published 2.498 lies inside" in text
    flat = sweep(
        [40_000], lambda s: ladder(1.2 * s, 1.3, 9), lambda s: s, curvature=0.0, seed_noise=0.01
    )
    text = "\n".join(fit_law(flat)["verdict"])
    assert "cannot be told from noise" in text
    assert "no curse beyond noise" in text
    assert "a linear law is not identified" in text


def test_nothing_finished_says_so():
    law = fit_law([])
    assert law["curves"] == law["laws"] == []
    assert law["verdict"] == ["No finished cell: nothing can be said about teachers."]


def test_mistakes_are_named():
    records = small()
    with pytest.raises(UserError, match="confidence 90"):
        fit_law(records, confidence=90)
    with pytest.raises(UserError, match="resamples 5"):
        fit_law(records, resamples=5)
    cell = next(record for record in records if record.kind == "cell")
    with pytest.raises(UserError, match="are the same run of the grid"):
        fit_law([*records, changed(cell, id="again")])
    tokens = [count + 1 for count in cell.heldout.document_tokens]
    other = changed(cell, heldout=cell.heldout.__dict__ | {"document_tokens": tokens})
    with pytest.raises(UserError, match="different held-out documents"):
        fit_law([other if record is cell else record for record in records])


def test_a_large_grid_is_fitted_in_seconds():
    records = sweep(
        ladder(40_000, 1.3, 10),
        lambda s: ladder(1.2 * s, 1.4, 8),
        lambda s: 2.5 * s,
        documents=100,
        **QUIET,
    )
    start = time.perf_counter()
    assert len(fit_law(records)["curves"]) == 10
    assert time.perf_counter() - start < 3


def sentences_of(records, words):
    return [one for one in fit_law(records, resamples=200)["verdict"] if words in one]


def with_values(records, **values):
    return [dataclasses.replace(record, **values) for record in records]


def test_what_moves_the_best_teacher_is_told():
    students = [40_000, 63_000, 100_000]

    def records(best, **values):
        made = sweep(students, lambda s: ladder(1.2 * s, 1.3, 9), lambda s: best * s)
        return with_values([r for r in made if r.kind == "cell"], **values)

    few = records(2.5)
    many = [dataclasses.replace(r, id=f"{r.id}-more") for r in records(4.0, tokens=1_600_000)]
    [told, *others] = sentences_of(few + many, "against 400k tokens")
    assert len(others) == 2
    assert "the ratio depends on tokens" in told
    assert "1.60 times" in told
    other = [dataclasses.replace(r, id=f"{r.id}-gpt2") for r in records(4.0, architecture="gpt2")]
    [told] = sentences_of(few + other, "T*/S")
    assert "depends on the architecture" in told
    same = [dataclasses.replace(r, id=f"{r.id}-gpt2") for r in records(2.5, architecture="gpt2")]
    assert "is the same within" in sentences_of(few + same, "T*/S")[0]


def test_a_teachers_own_loss_and_its_size_are_set_against_each_other():
    records = sweep([50_000, 70_000], lambda _: ladder(90_000, 1.3, 9), lambda s: 2.5 * s)
    [told] = sentences_of(records, "its teacher's own loss")
    assert "fall in step with sizes" in told

    def disturbed(record):
        """Cells that follow teachers whose losses do not follow their sizes."""
        if record.kind == "baseline":
            return record
        luck = 0.3 * np.sin(7 * np.log(record.teacher_size))
        held = record.heldout
        moved = [
            nats + luck * tokens
            for nats, tokens in zip(held.document_losses, held.document_tokens, strict=True)
        ]
        changed = dataclasses.replace(held, loss=held.loss + luck, document_losses=moved)
        return dataclasses.replace(record, heldout=changed)

    [told] = sentences_of([disturbed(r) for r in records], "its teacher's own loss")
    assert "its own loss tells more" in told


def test_students_still_learning_and_one_rate_for_all_are_warned_of():
    records = sweep([40_000, 63_000, 100_000], lambda s: ladder(1.2 * s, 1.3, 6), lambda s: 2 * s)
    assert not {"still_learning", "one_learning_rate"} & names(fit_law(records))
    falling = TrainingCurve(step=list(range(40)), ce=[4 - 0.03 * step for step in range(40)])
    flat = TrainingCurve(step=list(range(40)), ce=[3.0] * 40)
    assert "still_learning" in names(fit_law(with_values(records, curve=falling)))
    assert "still_learning" not in names(fit_law(with_values(records, curve=flat)))
    assert "one_learning_rate" in names(fit_law(with_values(records, learning_rate=0.001)))
