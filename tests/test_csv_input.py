"""Tables of cells: what is read, and what is refused."""

import json
import math
import re
from pathlib import Path

import pytest

from capgap.errors import UserError
from capgap.law.data import cells_of, write_grid
from capgap.law.fit import fit
from capgap.law.table import read_table
from law_surface import ladder, sweep

HEADER = "architecture,init,tokens,student_parameters,teacher_parameters,seed,loss"


def write(path, rows, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def rows_of(students=(40e6, 70e6, 120e6), ratios=(1.3, 1.8, 2.5, 3.4, 4.6), best=2.5):
    return [
        f"gpt2,pruned,10B,{student:.0f},{student * ratio:.0f},0,"
        f"{3 + 0.05 * math.log(ratio / best) ** 2:.9f}"
        for student in students
        for ratio in ratios
    ]


def test_a_table_gives_the_law_of_its_truth(tmp_path):
    teachers = ladder(60e6, 1.4, 9)
    rows = [
        f"gpt2,pruned,10B,{s / 1e6:g}M,{t},{seed},{3 + 0.05 * math.log(t / 2.2 / s) ** 2:.9f}"
        for s in (40e6, 70e6, 120e6)
        for t in teachers
        for seed in (0, 1)
    ]
    [line] = fit(read_table(write(tmp_path / "t.csv", rows))).lines
    assert line.is_identified
    assert line.slope.value == pytest.approx(2.2, rel=0.01)


def test_a_sweeps_grid_is_such_a_table(tmp_path):
    records = sweep([40_000, 63_000, 90_000], lambda s: ladder(70_000, 1.4, 7), lambda s: 2.5 * s)
    write_grid(records, tmp_path / "grid.csv")
    table = read_table(tmp_path / "grid.csv")
    [ours], [theirs] = fit(table).lines, fit(cells_of(records)).lines
    assert ours.slope.value == pytest.approx(theirs.slope.value, rel=1e-2)
    kinds = {row.reason.split(":")[0] for row in table.excluded}
    assert kinds == {"a teacher", "a baseline"}
    assert not table.missing
    # every seed has teachers of its own there
    assert table.frame["training"].nunique() == 14


def test_the_projects_own_grid_is_read():
    """It names neither architecture nor init."""
    law = fit(read_table(Path(__file__).parents[1] / "docs/results/search/grid.csv"), draws=200)
    assert {(curve.architecture, curve.init) for curve in law.curves} == {("unnamed", "unnamed")}
    assert len(law.curves) == 9


@pytest.mark.parametrize(
    ("separator", "rewrite"),
    [
        (";", lambda row: row.replace(".", ",")),
        ("\t", lambda row: row),
        (
            ";",
            lambda row: re.sub(r"^([^;]*;[^;]*;[^;]*;)(\d+)000000;", r"\g<1>\g<2>.000.000;", row),
        ),
        (";", lambda row: re.sub(r"^([^;]*;[^;]*;[^;]*;)(\d+)000000;", r"\1\2 000 000;", row)),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, separator, rewrite):
    plain = read_table(write(tmp_path / "plain.csv", rows_of()))
    lines = [rewrite(row.replace(",", separator)) for row in rows_of()]
    path = tmp_path / "other.csv"
    text = "\n".join([HEADER.replace(",", separator), *lines])
    path.write_text("\ufeff" + text, encoding="utf-8")
    found = read_table(path)
    assert found.frame.equals(plain.frame)
    assert found.losses == pytest.approx(plain.losses)


def test_counts_and_losses_as_people_write_them(tmp_path):
    rows = [row.replace(",", ";").replace("10B", "1,5B") for row in rows_of()]
    table = read_table(write(tmp_path / "t.csv", rows, HEADER.replace(",", ";")))
    assert set(table.frame["tokens"]) == {1_500_000_000}
    quoted = [row.rsplit(",", 1)[0] + ',"3,250"' for row in rows_of()]
    with pytest.raises(UserError, match="loss '3,250': give a positive, finite number"):
        read_table(write(tmp_path / "t.csv", quoted))


def test_blank_lines_and_columns_without_a_name_are_passed_over(tmp_path):
    plain = read_table(write(tmp_path / "plain.csv", rows_of()))
    rows = [f"{row},a,b,," for row in rows_of()]
    path = write(tmp_path / "t.csv", ["  ", *rows, ",,,", " "], f"\n{HEADER},note,note,,")
    assert read_table(path).frame.equals(plain.frame)


def test_stated_errors_blur_the_optimum_only_where_they_are_independent(tmp_path):
    header = f"{HEADER},loss_stderr"
    rows = [f"{row},0.02" for row in rows_of()]
    path = write(tmp_path / "t.csv", rows, header)

    def errors(independent):
        point = fit(read_table(path, independent_errors=independent)).curves[0].points[0]
        return point.cost_stderr, point.loss_stderr

    common, own = errors(False), errors(True)
    assert common[0] < 0.005 < 0.01 < own[0]
    assert common[1] == pytest.approx(0.02, rel=0.1)
    assert own[1] == pytest.approx(0.02, rel=0.3)


def test_a_repeated_row_is_listed(tmp_path):
    rows = rows_of()
    table = read_table(write(tmp_path / "t.csv", [*rows, rows[0]]))
    [row] = table.excluded
    assert row.id == f"line {len(rows) + 2}"
    assert row.reason == "the same cell as line 2, with the same loss"


def test_missing_columns_are_warnings(tmp_path):
    law = fit(read_table(write(tmp_path / "t.csv", rows_of())))
    named = [w.message for w in law.warnings if w.name == "missing_column"]
    assert len(named) == 4
    assert any("one training of every size is assumed" in message for message in named)


def test_teachers_of_a_table_that_do_not_improve_are_told(tmp_path):
    def warned(losses):
        rows = [f"{row},{losses[i % 5]}" for i, row in enumerate(rows_of(students=(40e6,)))]
        path = write(tmp_path / "t.csv", rows, f"{HEADER},teacher_loss")
        found = fit(read_table(path)).warnings
        return [one.message for one in found if one.name == "teacher_loss_not_falling"]

    assert not warned((3.0, 2.9, 2.8, 2.7, 2.6))
    [message] = warned((3.0, 2.9, 2.8, 2.85, 2.6))
    assert message.startswith("the 136M teacher is not better than the 100M one")
    assert "0.0500 nats higher" in message


def changed(number, **values):
    rows = [dict(zip(HEADER.split(","), row.split(","), strict=True)) for row in rows_of()]
    rows[number] |= values
    return [",".join(row.values()) for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(1, loss="-2"), "line 3: loss '-2': give a positive, finite number"),
        (changed(1, loss="nan"), "line 3: loss 'nan': give a positive"),
        (changed(1, loss="inf"), "line 3: loss 'inf': give a positive"),
        (changed(1, loss=""), "line 3: loss '': give a positive"),
        (changed(1, loss="21.5"), r"line 3: loss 21.5 is above ln\(vocabulary\), 13.8"),
        (
            [f"a,pruned,1B,{s}M,{t}M,0,0.{s}" for s in (40, 70) for t in (100, 200)],
            "looks like accuracies",
        ),
        (changed(2, seed="a"), "line 4: seed 'a': give a whole number"),
        (changed(2, seed=""), "line 4: seed '': give a whole number"),
        (changed(2, tokens="1,5"), "more fields than column names"),
        ([*rows_of(), '"'], "is no table of comma-separated values"),
        (changed(2, tokens="many"), "line 4: tokens 'many': give a positive whole number"),
        (changed(0, teacher_parameters="52"), "line 2: teacher_parameters 52 beside 552M"),
        (changed(3, init=" "), "line 5: init '': name it"),
        ([*rows_of(), rows_of()[0] + "1"], ""),
        ([*rows_of(), rows_of()[0].rsplit(",", 1)[0] + ",3.5"], "same cell with the losses"),
        (rows_of(ratios=(2.5,)), "no student has more than one teacher"),
        ([], "has no row"),
    ],
)
def test_what_is_refused(tmp_path, rows, message):
    path = write(tmp_path / "t.csv", rows)
    if not message:
        assert len(read_table(path).frame)
        return
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_columns_that_lack_and_mixed_tokenizers(tmp_path):
    with pytest.raises(UserError, match="lacks tokens, loss; it has"):
        read_table(
            write(tmp_path / "t.csv", [], "architecture,init,student_parameters,teacher_parameters")
        )
    rows = [f"{row},{'a' if i else 'b'}" for i, row in enumerate(rows_of())]
    with pytest.raises(UserError, match="mixes the tokenizers a, b"):
        read_table(write(tmp_path / "t.csv", rows, f"{HEADER},tokenizer"))
    with pytest.raises(UserError, match="no table"):
        read_table(tmp_path / "absent.csv")


def test_a_name_for_teachers_of_several_sizes_and_two_columns_of_a_name(tmp_path):
    rows = [f"{row},qwen" for row in rows_of()]
    with pytest.raises(UserError, match="'qwen' stands for several sizes"):
        read_table(write(tmp_path / "t.csv", rows, f"{HEADER},teacher"))
    with pytest.raises(UserError, match="two columns 'loss'"):
        read_table(write(tmp_path / "t.csv", [f"{row},1" for row in rows_of()], f"{HEADER},Loss"))
    with pytest.raises(UserError, match="more fields than column names"):
        read_table(write(tmp_path / "t.csv", [f"{row}," for row in rows_of()]))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_command(tmp_path, typed, monkeypatch, scheme):
    monkeypatch.setenv("CAPGAP_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "t.csv", rows_of())
    done = typed(
        "fit", f"{scheme}{path}", "--out", tmp_path / "law.json", "--report", tmp_path / "law.html"
    )
    assert done.code == 0
    assert "Twice the student wants 2.0 times the teacher" in done.out
    assert json.loads((tmp_path / "law.json").read_text())["lines"]
    assert "<html" in (tmp_path / "law.html").read_text()
    failed = typed("fit", f"{scheme}{tmp_path}/none.csv")
    assert failed.code == 2
    assert ("there is nothing at file://" if scheme else "no table") in failed.err
