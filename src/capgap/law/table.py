"""A table of cells that anybody may have published, as CSV -> cells."""

import csv
import math
import re
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import pandas
from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo

from capgap.errors import UserError, check_regular
from capgap.law.data import CURVE, FRAME, KEYS, LARGEST_VOCABULARY, LOST, Cells, cells_of
from capgap.law.law import Excluded
from capgap.records import read_records
from capgap.sizes import format_count, parse_count

# Sizes of one architecture further apart than this are taken for a mixture of units
WIDEST_RANGE = 1e4
SMALLEST_MODEL = 1_000
SAME_LOSS = 1e-9  # two rows of one place may differ by rounding


def _number(text: str) -> str:
    """A comma before decimals is a point, as in 3,05 or 1,5B; between thousands it is nothing."""
    if re.fullmatch(r"\d+,\d+[kmbtKMBT]?", text) and not re.fullmatch(r"\d{1,3},\d{3}", text):
        return text.replace(",", ".")
    return text


def _count(text: str) -> int:
    # thousands may be parted by points, commas, spaces or apostrophes
    plain = re.sub(r"[\s'\u2019]", "", text).removesuffix(".0")
    if re.fullmatch(r"\d{1,3}([.,]\d{3})+", plain):
        plain = re.sub("[.,]", "", plain)
    try:
        return parse_count(_number(plain))
    except UserError:
        raise ValueError("give a positive whole number, plain or like 300k, 1.5M, 3B") from None


def _real(text: str, info: ValidationInfo) -> float:
    """Where commas part the fields, one in a field is none before decimals."""
    text = text if info.context == "," else _number(text)
    try:
        return float(text)
    except ValueError:
        return math.nan


def _loss(text: str, info: ValidationInfo) -> float:
    value = _real(text, info)
    if not (0 < value < math.inf or (value == 0 and info.field_name == "loss_stderr")):
        raise ValueError("give a positive, finite number of nats per token, or take the row out")
    return value


def _whole(text: str, info: ValidationInfo) -> int:
    if not _real(text, info).is_integer():
        raise ValueError("give a whole number")
    return int(_real(text, info))


def _name(text: str) -> str:
    if not text:
        raise ValueError("name it")
    return text


Count = Annotated[int, BeforeValidator(_count)]
Loss = Annotated[float, BeforeValidator(_loss)]
Name = Annotated[str, BeforeValidator(_name)]


class _Row(BaseModel):
    """A row of the table; NaN, 0 or no text for what it leaves away."""

    tokens: Count
    student_parameters: Count
    teacher_parameters: Count
    loss: Loss
    architecture: Name = "unnamed"
    init: Name = "unnamed"
    teacher: str = ""
    seed: Annotated[int, BeforeValidator(_whole)] = 0
    loss_stderr: Loss = math.nan
    teacher_loss: Loss = math.nan
    baseline_loss: Loss = math.nan
    teacher_tokens: Annotated[float, BeforeValidator(_count)] = math.nan
    tokenizer: str = ""
    vocabulary: Count = LARGEST_VOCABULARY
    student_size: Count = 0
    teacher_size: Count = 0


REQUIRED = tuple(name for name, field in _Row.model_fields.items() if field.is_required())
# what a sweep's own grid.csv has besides
_ASKED = ("student_size", "teacher_size")
OPTIONAL = tuple(name for name in _Row.model_fields if name not in (*REQUIRED, *_ASKED))


def load_cells(source: Path | str, *, independent_errors: bool = False) -> Cells:
    """The cells of a sweep's output folder, or of a table (`read_table`)."""
    source = Path(source)
    if not source.is_dir():
        return read_table(source, independent_errors=independent_errors)
    if independent_errors:
        raise UserError("--independent-errors is for tables; records hold every document")
    return cells_of(read_records(source))


def read_table(path: Path | str, *, independent_errors: bool = False) -> Cells:
    """Reads a table with the columns of docs/output.md, separated by commas, semicolons or tabs.

    `independent_errors`: whether `loss_stderr` is each cell's own, as for losses on texts of their
    own; else it is taken as common to the cells of a curve, as for losses on the same text.
    UserError names the line and the value: missing columns, values that are no numbers or no losses
    in nats per token, cells given twice with different losses, several tokenizers in one curve,
    sizes in several units, fewer than two teachers for every student.
    """
    path = Path(path)
    separator, columns, rows = _load(path)
    excluded: list[Excluded] = []
    own = [row for row in rows if _is_cell(row, excluded)]
    table = pandas.DataFrame([_checked(row, separator, path) for row in own])
    if table.empty:
        raise UserError(f"{path} has no row of a finished cell")
    _check_losses(table, path)
    _check_units(table, path)
    for who in ("student", "teacher"):
        size = f"{who}_size"
        if not table[size].all():
            table[size] = table[f"{who}_parameters"]
    table["training"] = table["teacher"].where(
        table["teacher"] != "", table["teacher_size"].astype(str)
    )
    table = _without_repeats(table, path, excluded)
    _check_curves(table, path)
    table = table.sort_values(KEYS, ignore_index=True)
    return Cells(
        frame=table[FRAME],
        cells=table[["loss"]].to_numpy(float),
        baselines=table[["baseline_loss"]].to_numpy(float),
        teachers=table[["teacher_loss"]].to_numpy(float),
        document_tokens=np.ones(1),
        own_errors=independent_errors,
        excluded=tuple(excluded),
        missing=tuple(name for name in LOST if name not in columns),
    )


def _load(path: Path) -> tuple[str, list[str], list[dict[str, str]]]:
    """The separator, names of columns, and rows of text with the number of their `line`."""
    check_regular(path, "a table")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            lines = [
                (reader.line_num, fields)
                for row in reader
                if any(fields := [field.strip() for field in row])
            ]
    except FileNotFoundError:
        raise UserError(f"no table {path}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of comma-separated values ({error})") from None
    columns = [name.lower() for name in lines.pop(0)[1]] if lines else []
    for name in (*_Row.model_fields, "kind", "status"):
        if columns.count(name) > 1:
            raise UserError(f"{path} has two columns {name!r}: keep one")
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(columns) or 'none'}. A table "
            f"needs {', '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)}"
        )
    for line, fields in lines:
        if len(fields) > len(columns):
            raise UserError(f"{path}, line {line}: more fields than column names")
    rows = [dict(zip(columns, held, strict=False)) | {"line": str(n)} for n, held in lines]
    return separator, columns, rows


def _is_cell(row: dict[str, str], excluded: list[Excluded]) -> bool:
    """Of a sweep's grid.csv the cells that finished; any other table is cells alone."""
    kind, status = row.get("kind", "cell"), row.get("status", "done")
    if (kind, status) == ("cell", "done"):
        return True
    reason = f"kind {kind!r}, status {status!r}: no finished cell"
    if status == "failed":
        reason = "failed"
    elif kind in ("teacher", "baseline"):
        reason = f"a {kind}: its loss is the {kind}_loss of the cells"
    excluded.append(Excluded(id=row.get("id") or f"line {row['line']}", reason=reason))
    return False


def _checked(row: dict[str, str], separator: str, path: Path) -> dict[str, Any]:
    # an empty field is one that the row leaves away, but where there must be something
    needed = (*REQUIRED, "architecture", "init", "seed")
    held = {name: text for name, text in row.items() if text or name in needed}
    try:
        found = _Row.model_validate(held, context=separator).model_dump()
    except ValidationError as error:
        name, why = str(error.errors()[0]["loc"][0]), error.errors()[0]["msg"]
        why = why.removeprefix("Value error, ")
        raise UserError(f"{path}, line {row['line']}: {name} {held[name]!r}: {why}") from None
    return found | {"line": int(row["line"])}


def _refuse(path: Path, table: pandas.DataFrame, wrong: pandas.Series, why: str) -> NoReturn:
    """UserError with the first line that is wrong."""
    raise UserError(f"{path}, line {table.loc[wrong, 'line'].iloc[0]}: {why}")


def _check_losses(table: pandas.DataFrame, path: Path) -> None:
    """Perplexities, percentages and accuracies look like numbers too."""
    limits = np.log(table["vocabulary"])
    for name in ("loss", "teacher_loss", "baseline_loss"):
        above = table[name] > limits
        if above.any():
            value, limit = (column[above].iloc[0] for column in (table[name], limits))
            why = (
                f"{name} {value:g} is above ln(vocabulary), {limit:.1f}, what guessing costs: nats "
                "per token are asked for, not a perplexity or a percentage"
            )
            _refuse(path, table, above, why)
    by_size = table.groupby("student_parameters")["loss"].mean()
    if table["loss"].max() <= 1 and len(by_size) > 1 and by_size.is_monotonic_increasing:
        raise UserError(
            f"{path}: all losses are below 1 and larger students have higher ones, which looks "
            "like accuracies: nats per token are asked for, where lower is better"
        )


def _check_units(table: pandas.DataFrame, path: Path) -> None:
    """Parameters of one row in billions and of another in millions."""
    both = "looks like another unit: give all in plain parameters, or with a suffix (7B, 70M)"
    for name in ("student_parameters", "teacher_parameters"):
        values = table[name]
        if values.max() > WIDEST_RANGE * values.min() or values.min() < SMALLEST_MODEL:
            small, large = int(values.min()), format_count(values.max())
            why = f"{name} {small} beside {large} in the same table {both}"
            _refuse(path, table, values == values.min(), why)
    below = table["teacher_parameters"] * 10 < table["student_parameters"]
    if below.any():
        row = table[below].iloc[0]
        teacher, student = (
            format_count(row[f"{who}_parameters"]) for who in ("teacher", "student")
        )
        _refuse(path, table, below, f"a teacher of {teacher} for a student of {student} {both}")


def _without_repeats(
    table: pandas.DataFrame, path: Path, excluded: list[Excluded]
) -> pandas.DataFrame:
    dropped = []
    for _, rows in table[table.duplicated(KEYS, keep=False)].groupby(KEYS, sort=False):
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
            excluded.append(Excluded(id=f"line {row['line']}", reason=reason))
    return table.drop(index=dropped)


def _check_curves(table: pandas.DataFrame, path: Path) -> None:
    names = table.groupby(CURVE)["tokenizer"].unique()
    for (architecture, init, tokens, student), own in names[names.map(len) > 1].items():
        raise UserError(
            f"{path}: the curve {architecture}, {init}, {format_count(tokens)} tokens, student "
            f"{format_count(student)} mixes the tokenizers {', '.join(sorted(own))}: losses "
            "per token of different tokens cannot be compared"
        )
    if (table.groupby(CURVE)["teacher_size"].nunique() < 2).all():
        raise UserError(
            f"{path}: no student has more than one teacher, so there is no curve to fit; the rows "
            "of one student must have the same student_parameters"
        )
    sizes = table.groupby(["architecture", "training"])["teacher_size"].nunique()
    for (_, name), _ in sizes[sizes > 1].items():
        raise UserError(
            f"{path}: teacher {name!r} stands for several sizes: the column names the training "
            "that made a teacher, so every size has names of its own"
        )
