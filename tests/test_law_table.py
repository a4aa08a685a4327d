"""grid.csv against values worked out by hand."""

import csv

import pytest

from capgap.errors import UserError
from capgap.law.data import grid_table, write_grid
from capgap.records import record_from_dict
from law_surface import parameters, run

DOCUMENTS = {"document_tokens": [100, 300], "seed": 0}
CELL = {"student_size": 50, "init": "pruned", "teacher_size": 200, "teacher": "t"}


def records():
    return [
        record_from_dict(values)
        for values in (
            run("teacher", "t", size=210, teacher_size=200, document_losses=[2, 2], **DOCUMENTS),
            run(
                "cell",
                "c",
                size=51,
                teacher_parameters=parameters(210),
                document_losses=[3, 3.4],
                after_cut={"loss": 5.5, "loss_stderr": 0.1},
                **CELL,
                **DOCUMENTS,
            ),
            run("baseline", "b", size=51, document_losses=[4, 4], **CELL, **DOCUMENTS),
            run(
                "cell",
                "c-failed",
                size=51,
                teacher_parameters=parameters(210),
                document_losses=[3, 3],
                **(CELL | {"init": "fixed"}),
                **DOCUMENTS,
            )
            | {"status": "failed", "heldout": None, "failure": {"message": "not finite"}},
        )
    ]


def test_the_table_on_disk(tmp_path):
    write_grid(records(), tmp_path / "grid.csv")
    with (tmp_path / "grid.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["b", "c", "c-failed", "t"]
    assert list(rows["c"]) == [
        "id",
        "kind",
        "status",
        "architecture",
        "init",
        "seed",
        "tokens",
        "student_size",
        "student_parameters",
        "teacher",
        "teacher_size",
        "teacher_parameters",
        "assistant_parameters",
        "loss",
        "loss_stderr",
        "bits_per_byte",
        "bits_per_byte_stderr",
        "teacher_loss",
        "after_cut_loss",
        "baseline_loss",
        "gain",
        "kl",
        "agreement",
        "flops_total",
        "wall_seconds",
    ]
    cell = rows["c"]
    assert float(cell["loss"]) == pytest.approx(3.3)  # weighted by tokens
    assert float(cell["gain"]) == pytest.approx(0.7)
    assert (cell["student_size"], cell["student_parameters"]) == ("50", "51")
    assert (cell["teacher_size"], cell["teacher_parameters"]) == ("200", "210")
    assert (cell["teacher_loss"], cell["after_cut_loss"]) == ("2.0", "5.5")
    assert (cell["kl"], cell["agreement"], cell["flops_total"]) == ("0.5", "0.4", "110")
    assert rows["c-failed"]["loss"] == rows["c-failed"]["gain"] == ""
    assert rows["t"]["student_size"] == rows["t"]["init"] == rows["b"]["gain"] == ""
    assert rows["t"]["teacher_parameters"] == "210"


def test_flops_beyond_64_bits_stay_whole():
    [teacher, *_] = records()
    plain = run("teacher", "t", size=210, teacher_size=200, document_losses=[2, 2], **DOCUMENTS)
    large = record_from_dict(plain | {"flops": {"student": 4 * 10**21}})
    assert grid_table([large])["flops_total"].tolist() == [4 * 10**21]
    assert grid_table([teacher])["flops_total"].tolist() == [110]


def test_no_records_make_an_empty_table():
    assert grid_table([]).empty


def test_two_baselines_of_one_place_are_an_error():
    baseline = records()[2]
    other = run("baseline", "b2", size=51, document_losses=[4, 4], **CELL, **DOCUMENTS)
    with pytest.raises(UserError, match="b and b2 are the same run"):
        grid_table([baseline, record_from_dict(other)])
