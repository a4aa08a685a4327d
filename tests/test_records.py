"""Records come back as they were written, and a broken one is named."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from capgap.artifact import read_json, write_json
from capgap.errors import UserError
from capgap.records import read_record, read_records, record_from_dict, write_record
from law_surface import run, sweep

TOKENS = [100, 200]


def teacher(**changes):
    plain = run(
        "teacher",
        "t100-seed0",
        size=100,
        seed=0,
        document_losses=[3.0, 3.5],
        document_tokens=TOKENS,
        teacher_size=100,
    )
    return plain | changes


def failed(**changes):
    why = {"message": "loss is not finite", "step": 12, "windows": [3, 77]}
    return teacher(status="failed", heldout=None, failure=why, **changes)


def test_round_trip_keeps_every_value(tmp_path):
    for values in (teacher(), failed()):
        record = record_from_dict(values)
        path = write_record(tmp_path / record.id, record)
        assert read_record(tmp_path / record.id) == record
        # the file itself holds the values given, not merely something that reads back equal
        stored = json.loads(path.read_text())
        for key in values.keys() - {"flops", "curve"}:
            assert stored[key] == values[key]
        assert stored["flops"]["student"] == 100
        assert stored["flops"]["pruning"] is None


def test_records_are_read_sorted_and_unfinished_runs_passed_over(tmp_path):
    records = sweep([100], lambda _: [200, 300], lambda _: 250)
    for record in reversed(records):
        write_record(tmp_path / "records" / record.id, record)
    (tmp_path / "records" / "a-run-not-finished").mkdir()
    assert read_records(tmp_path) == sorted(records, key=lambda record: record.id)


def test_what_is_not_finite_is_refused_or_becomes_null_with_its_failure():
    broken = failed(curve={"step": [1, 2], "ce": [3.0, math.nan], "gradient_norm": [1.0, math.inf]})
    record = record_from_dict(broken)
    assert record.curve.ce == [3.0, None]
    assert record.curve.gradient_norm == [1.0, None]
    assert record.failure is not None
    with pytest.raises(UserError, match=r"heldout\.loss"):
        record_from_dict(teacher(heldout=teacher()["heldout"] | {"loss": math.nan}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (teacher(schema=2), "schema 2 is not known"),
        (teacher(learning_rat=1), "learning_rat"),
        (teacher(heldout=None), "heldout is missing"),
        (teacher(status="failed"), "failure is missing"),
        (teacher(kind="cell"), "a cell record needs init, student_size"),
        (teacher(tokens="many"), "tokens"),
        ([1], "no JSON object"),
    ],
)
def test_a_wrong_record_is_named_with_its_mistake(tmp_path, values, message):
    folder = tmp_path / "records" / "r"
    write_json(folder / "record.json", values)
    with pytest.raises(UserError, match=message) as caught:
        read_records(tmp_path)
    assert str(folder / "record.json") in str(caught.value)


def test_a_truncated_file_and_a_missing_folder_are_named(tmp_path):
    folder = tmp_path / "records" / "r"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema": 1, "ki')
    with pytest.raises(UserError, match="is damaged"):
        read_records(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_records(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="does not exist"):
        read_record(tmp_path)


def test_documents_need_a_loss_each():
    heldout = teacher()["heldout"] | {"document_losses": [1.0]}
    with pytest.raises(UserError, match="1 document_losses but 2 document_tokens"):
        record_from_dict(teacher(heldout=heldout))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"array": np.arange(3), "number": np.int64(7), "path": Path("x")})
    before = path.read_text()
    assert read_json(path) == {"array": [0, 1, 2], "number": 7, "path": "x"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": math.nan})
    with pytest.raises(UserError, match="cannot write into"):
        write_json(path / "below-a-file.json", {})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_records_cannot_be_changed():
    record = record_from_dict(teacher())
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seed = 3
