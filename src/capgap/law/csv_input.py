"""A table of cells, as anybody may have published one -> the curves that a law is fitted on.

One row is one distilled student. A `grid.csv` that a sweep wrote is such a table as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas

from capgap.errors import UserError, check_regular
from capgap.law.cells import CurveData, Floats, Kind
from capgap.sizes import format_count, parse_count

REQUIRED = (
    "architecture",
    "init",
    "tokens",
    "student_parameters",
    "teacher_parameters",
    "loss",
)
OPTIONAL = ("seed", "loss_stderr", "teacher_loss", "baseline_loss", "teacher_tokens", "tokenizer")
# grid.csv has these as well: its rows of teachers and baselines are columns of the cells' rows
GRID = ("id", "kind", "status", "student_size", "teacher_size")
COUNTS = ("tokens", "student_parameters", "teacher_parameters")
# Sizes of one architecture further apart than this are taken for a mixture of units
WIDEST_RANGE = 1e4
SMALLEST_MODEL = 1_000
# Two rows of one place may differ by rounding
SAME_LOSS = 1e-9


@dataclass(frozen=True)
class TableCells:
    """What a table holds. `excluded`: the rows that no fit uses, each with its reason."""

    curves: list[CurveData]
    excluded: list[dict[str, str]]
    missing_columns: tuple[str, ...]


def read_table(path: Path, *, independent_errors: bool = False) -> TableCells:
    """Reads a CSV with the columns of docs/output.md.

    `independent_errors`: whether `loss_stderr` is each cell's own, as for losses on texts of their
    own; else it is taken as common to the cells of a curve, as for losses on the same text.
    UserError names the line and the value: missing columns, values that are no numbers, losses or
    sizes that are not positive and finite, cells given twice with different losses, several
    tokenizers in one curve, sizes in several units, fewer than two teachers for every student.
    """
    table = _load(path)
    table, excluded = _cells_only(table)
    if table.empty:
        raise UserError(f"{path} has no row of a finished cell")
    for name in COUNTS:
        table[name] = _counts(table, name, path)
    for name in ("loss", "loss_stderr", "teacher_loss", "baseline_loss"):
        if name in table:
            table[name] = _losses(table, name, path, required=name == "loss")
    if "teacher_tokens" in table:
        table["teacher_tokens"] = _known_counts(table, "teacher_tokens", path)
    table["seed"] = _seeds(table, path)
    for name in ("architecture", "init"):
        table[name] = table[name].str.strip()
        if (empty := table[name].eq("") | table[name].isna()).any():
            raise UserError(f"{_line(path, table, empty)}: {name} is empty; name it")
    _check_units(table, path)
    table, repeated = _without_repeats(table, path)
    missing = tuple(name for name in OPTIONAL[:4] if name not in table)
    curves = []
    keys = ["architecture", "init", "tokens", _student_key(table)]
    for (architecture, init, tokens, _), rows in table.groupby(keys, sort=True):
        kind = Kind(str(architecture), str(init), int(tokens))
        curves.append(_curve(kind, rows, path, independent_errors))
    if all(curve.num_teachers < 2 for curve in curves):
        raise UserError(
            f"{path}: no student has more than one teacher, so there is no curve to fit; the rows "
            "of one student must have the same student_parameters"
        )
    return TableCells(curves, excluded + repeated, missing)


def _load(path: Path) -> pandas.DataFrame:
    check_regular(path, "a table")
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except FileNotFoundError:
        raise UserError(f"no table {path}") from None
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of comma-separated values ({error})") from None
    table.columns = [str(name).strip() for name in table.columns]
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has "
            f"{', '.join(table.columns)}. A table needs {', '.join(REQUIRED)}, and may have "
            f"{', '.join(OPTIONAL)}"
        )
    # line 1 of the file is the header
    table["line"] = np.arange(2, len(table) + 2)
    return table


def _cells_only(table: pandas.DataFrame) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    """Of a sweep's grid.csv the cells that finished; any other table is cells alone."""
    excluded = []
    kinds = table["kind"] if "kind" in table else pandas.Series("cell", index=table.index)
    states = table["status"] if "status" in table else pandas.Series("done", index=table.index)
    for _, row in table[(kinds != "cell") | (states != "done")].iterrows():
        name = row.get("id") or f"line {row['line']}"
        if row.get("status") == "failed":
            excluded.append({"id": name, "reason": "failed"})
        elif row.get("kind") in ("teacher", "baseline"):
            reason = f"a {row['kind']}: its loss is the {row['kind']}_loss of the cells"
            excluded.append({"id": name, "reason": reason})
        else:
            reason = f"kind {row.get('kind')!r}, status {row.get('status')!r}: no finished cell"
            excluded.append({"id": name, "reason": reason})
    return table[(kinds == "cell") & (states == "done")].copy(), excluded


def _line(path: Path, table: pandas.DataFrame, wrong: pandas.Series) -> str:
    return f"{path}, line {table.loc[wrong, 'line'].iloc[0]}"


def _counts(table: pandas.DataFrame, name: str, path: Path) -> list[int]:
    found = []
    for line, text in zip(table["line"], table[name], strict=True):
        try:
            found.append(parse_count(text.removesuffix(".0")))
        except UserError as error:
            raise UserError(f"{path}, line {line}: {name}: {error}") from None
    return found


def _known_counts(table: pandas.DataFrame, name: str, path: Path) -> pandas.Series:
    """Counts where the field is not empty, else NaN."""
    known = table[table[name].str.strip() != ""]
    return pandas.Series(_counts(known, name, path), index=known.index, dtype=float).reindex(
        table.index
    )


def _losses(table: pandas.DataFrame, name: str, path: Path, *, required: bool) -> pandas.Series:
    empty = table[name].str.strip() == ""
    if required and empty.any():
        raise UserError(f"{_line(path, table, empty)}: {name} is missing; take the row out")
    values = pandas.to_numeric(table[name].where(~empty), errors="coerce").astype(float)
    wrong = ~empty & ~((values > 0) & np.isfinite(values))
    if name == "loss_stderr":
        wrong &= values.ne(0)
    if wrong.any():
        raise UserError(
            f"{_line(path, table, wrong)}: {name} {table.loc[wrong, name].iloc[0]!r} is no loss in "
            "nats per token: it must be a positive, finite number"
        )
    return values


def _seeds(table: pandas.DataFrame, path: Path) -> pandas.Series:
    if "seed" not in table:
        return pandas.Series(0, index=table.index)
    values = pandas.to_numeric(table["seed"], errors="coerce")
    wrong = values.isna() | (values % 1 != 0)
    if wrong.any():
        raise UserError(
            f"{_line(path, table, wrong)}: seed {table.loc[wrong, 'seed'].iloc[0]!r} is no whole "
            "number"
        )
    return values.astype(int)


def _check_units(table: pandas.DataFrame, path: Path) -> None:
    """Parameters of one row in billions and of another in millions."""
    for name in ("student_parameters", "teacher_parameters"):
        values = table[name]
        smallest = values == values.min()
        if values.max() > WIDEST_RANGE * values.min() or values.min() < SMALLEST_MODEL:
            small, large = int(values.min()), format_count(values.max())
            raise UserError(
                f"{_line(path, table, smallest)}: {name} {small} beside {large} in the same table "
                "looks like another unit: give all in plain parameters, or with a suffix (7B, 70M)"
            )
    below = table["teacher_parameters"] * 10 < table["student_parameters"]
    if below.any():
        row = table[below].iloc[0]
        raise UserError(
            f"{_line(path, table, below)}: a teacher of {format_count(row['teacher_parameters'])} "
            f"for a student of {format_count(row['student_parameters'])} looks like another unit: "
            "give both in plain parameters, or with a suffix (7B, 70M)"
        )


def _student_key(table: pandas.DataFrame) -> str:
    return "student_size" if _asked(table, "student_size") else "student_parameters"


def _asked(table: pandas.DataFrame, name: str) -> bool:
    """Whether the sizes that a recipe asked for are there: cuts may miss them by a percent."""
    return name in table and bool((table[name].str.strip() != "").all())


def _without_repeats(
    table: pandas.DataFrame, path: Path
) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    teacher = "teacher_size" if _asked(table, "teacher_size") else "teacher_parameters"
    keys = ["architecture", "init", "tokens", _student_key(table), teacher, "seed"]
    excluded, dropped = [], []
    for _, rows in table.groupby(keys, sort=False):
        first = rows.iloc[0]
        for index, row in rows.iloc[1:].iterrows():
            if abs(row["loss"] - first["loss"]) > SAME_LOSS:
                raise UserError(
                    f"{path}, lines {first['line']} and {row['line']} are the same cell with the "
                    f"losses {first['loss']:g} and {row['loss']:g}: keep one, or give them "
                    "different seeds"
                )
            dropped.append(index)
            reason = f"the same cell as line {first['line']}, with the same loss"
            excluded.append({"id": f"line {row['line']}", "reason": reason})
    return table.drop(index=dropped), excluded


def _curve(kind: Kind, rows: pandas.DataFrame, path: Path, independent_errors: bool) -> CurveData:
    if "tokenizer" in rows and rows["tokenizer"].nunique() > 1:
        names = ", ".join(sorted(rows["tokenizer"].unique()))
        raise UserError(
            f"{path}: the curve {kind}, student {format_count(rows['student_parameters'].mean())} "
            f"mixes the tokenizers {names}: losses per token of different tokens cannot be compared"
        )
    by_size = "teacher_size" if _asked(rows, "teacher_size") else "teacher_parameters"
    sizes = rows[by_size].map(parse_count)
    rows = rows.assign(size=sizes).sort_values(["size", "seed"])
    teachers = sorted(sizes.unique())
    student = round(float(rows["student_parameters"].mean()))

    def column(name: str) -> Floats:
        if name not in rows:
            return np.full((len(rows), 1), np.nan)
        return rows[name].to_numpy(dtype=float)[:, None]

    stderr = None
    if "loss_stderr" in rows:
        stderr = np.nan_to_num(rows["loss_stderr"].to_numpy(dtype=float))
    return CurveData(
        kind=kind,
        student_size=parse_count(rows[_student_key(rows)].iloc[0])
        if _asked(rows, "student_size")
        else student,
        student_parameters=student,
        teacher_sizes=tuple(int(size) for size in teachers),
        teacher_parameters=_means(rows, "teacher_parameters", teachers),
        teacher_tokens=_means(rows, "teacher_tokens", teachers)
        if "teacher_tokens" in rows
        else np.full(len(teachers), np.nan),
        cell_teacher=np.array([teachers.index(size) for size in rows["size"]]),
        cell_seed=rows["seed"].to_numpy(),
        cell_documents=column("loss"),
        baseline_documents=column("baseline_loss"),
        teacher_documents=column("teacher_loss"),
        document_tokens=np.ones(1),
        cell_stderr=stderr,
        independent_errors=independent_errors,
    )


def _means(rows: pandas.DataFrame, name: str, teachers: Sequence[int]) -> Floats:
    return np.array([rows.loc[rows["size"] == teacher, name].mean() for teacher in teachers])
