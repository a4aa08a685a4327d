"""Cells from elsewhere: a CSV that anybody may have published, and runs of `capgap distill`."""

import csv
import re
from math import inf, nan
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import pandas
from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo

from capgap.artifact import read_json
from capgap.errors import UserError, check_regular
from capgap.law.data import CURVE, FRAME, KEYS, LARGEST_VOCABULARY, Cells, cells_of
from capgap.law.law import Excluded
from capgap.law.model import Floats
from capgap.records import read_records
from capgap.sizes import format_count, parse_count

# Sizes of one architecture further apart than this are taken for a mixture of units
WIDEST_RANGE = 1e4
SMALLEST_MODEL = 1_000
SAME_LOSS = 1e-9  # two rows of one cell may differ by rounding
# Distilled students of one size: shapes miss the size that was asked for by up to 2%
SAME_SIZE = 1.05
LOSSES = ["loss", "teacher_loss", "baseline_loss"]
# What a table may leave away, and what is not known then
LOST = {
    "teacher": "one training of every size is assumed to have taught all seeds",
    "seed": "every row counts as a run of one seed",
    "loss_stderr": "the losses' own standard errors are not known",
    "teacher_loss": "whether the teachers improve as they grow is not known",
    "baseline_loss": "what distilling gains is not known",
}


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
    """A comma within a field is a decimal one only where other marks separate the fields."""
    try:
        return float(text if info.context == "," else _number(text))
    except ValueError:
        return nan


def _loss(text: str, info: ValidationInfo) -> float:
    value = _real(text, info)
    if not (0 < value < inf or (value == 0 and info.field_name == "loss_stderr")):
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
    loss_stderr: Loss = nan
    teacher_loss: Loss = nan
    baseline_loss: Loss = nan
    teacher_tokens: Annotated[float, BeforeValidator(_count)] = nan
    tokenizer: str = ""
    vocabulary: Count = LARGEST_VOCABULARY
    student_size: Count = 0
    teacher_size: Count = 0


REQUIRED = tuple(name for name, field in _Row.model_fields.items() if field.is_required())
# the sizes that were asked for, which the grid.csv of a sweep has
_ASKED = ("student_size", "teacher_size")
OPTIONAL = tuple(name for name in _Row.model_fields if name not in (*REQUIRED, *_ASKED))


def load_cells(source: Path | str, *, independent_errors: bool = False) -> Cells:
    """The cells of a sweep's output folder, of those of `capgap distill`, or of a table."""
    source = Path(source)
    if not source.is_dir():
        return read_table(source, independent_errors=independent_errors)
    if independent_errors:
        raise UserError("`independent_errors` is for tables; records hold every document")
    if has_distillations(source):
        return read_distillations(source)
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
    check_regular(path, "a table")
    separator, columns, rows = _load(path)
    excluded: list[Excluded] = []
    own = [row for row in rows if _is_cell(row, excluded)]
    table = pandas.DataFrame([_checked(row, separator, path) for row in own])
    missing = tuple(name for name in LOST if name not in columns)
    return _cells(table, path, excluded, own_errors=independent_errors, missing=missing)


def _cells(table: pandas.DataFrame, source: Path, excluded: list[Excluded], **more: Any) -> Cells:
    """Checks the table, whose column `where` names the origin of each row, and sorts it."""
    if table.empty:
        raise UserError(f"{source} has no row of a finished cell")
    _check_losses(table, source)
    _check_units(table, source)
    for who in ("student", "teacher"):
        if not table[f"{who}_size"].all():
            table[f"{who}_size"] = table[f"{who}_parameters"]
    size = table["teacher_size"].astype(str)
    table["training"] = table["teacher"].where(table["teacher"] != "", size)
    table = _without_repeats(table, source, excluded)
    _check_curves(table, source)
    table = table.sort_values(KEYS, ignore_index=True)
    tokens, documents = np.ones(1), table[LOSSES].to_numpy(float)[..., None]
    if "documents" in table:
        # [cells, losses, documents]
        tokens, documents = table["document_tokens"][0], np.array(table["documents"].tolist())
    return Cells(
        frame=table[FRAME],
        cells=documents[:, 0],
        teachers=documents[:, 1],
        baselines=documents[:, 2],
        document_tokens=tokens,
        excluded=tuple(excluded),
        **more,
    )


def _load(path: Path) -> tuple[str, list[str], list[dict[str, str]]]:
    """The separator, names of columns, and rows of text; `where` is the number of their line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            stripped = ([field.strip() for field in row] for row in reader)
            lines = [(f"line {reader.line_num}", row) for row in stripped if any(row)]
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
            raise UserError(f"{path}, {line}: more fields than column names")
    rows = [dict(zip(columns, row, strict=False)) | {"where": line} for line, row in lines]
    return separator, columns, rows


def _is_cell(row: dict[str, str], excluded: list[Excluded]) -> bool:
    """Whether a row is a finished cell: the grid.csv of a sweep has other rows too."""
    kind, status = row.get("kind", "cell"), row.get("status", "done")
    if (kind, status) == ("cell", "done"):
        return True
    reason = f"kind {kind!r}, status {status!r}: no finished cell"
    if status == "failed":
        reason = "failed"
    elif kind in ("teacher", "baseline"):
        reason = f"a {kind}: its loss is the {kind}_loss of the cells"
    excluded.append(Excluded(id=row.get("id") or row["where"], reason=reason))
    return False


def _checked(row: dict[str, str], separator: str, path: Path) -> dict[str, Any]:
    # an empty field is one that the row leaves away, but where there must be something
    needed = (*REQUIRED, "architecture", "init", "seed")
    given = {name: text for name, text in row.items() if text or name in needed}
    try:
        values = _Row.model_validate(given, context=separator).model_dump()
    except ValidationError as error:
        name, why = str(error.errors()[0]["loc"][0]), error.errors()[0]["msg"]
        why = why.removeprefix("Value error, ")
        raise UserError(f"{path}, {row['where']}: {name} {given[name]!r}: {why}") from None
    return values | {"where": row["where"]}


def _refuse(path: Path, table: pandas.DataFrame, wrong: pandas.Series, why: str) -> NoReturn:
    """UserError with the first row that is wrong."""
    raise UserError(f"{path}, {table.loc[wrong, 'where'].iloc[0]}: {why}")


def _check_losses(table: pandas.DataFrame, path: Path) -> None:
    """Perplexities, percentages and accuracies look like numbers too."""
    limits = np.log(table["vocabulary"])
    for name in LOSSES:
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
    firsts = table.drop_duplicates(KEYS).set_index(KEYS)
    repeats = table[table.duplicated(KEYS)]
    for _, row in repeats.iterrows():
        first = firsts.loc[tuple(row[KEYS])]
        if abs(row["loss"] - first["loss"]) > SAME_LOSS:
            raise UserError(
                f"{path}: {first['where']} and {row['where']} are the same cell with the losses "
                f"{first['loss']:g} and {row['loss']:g}: keep one, or give them different seeds"
            )
        reason = f"the same cell as {first['where']}, with the same loss"
        excluded.append(Excluded(id=row["where"], reason=reason))
    return table.drop(index=repeats.index)


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


def has_distillations(folder: Path) -> bool:
    """Whether a folder is no sweep's, and runs of `capgap distill` lie in it."""
    return not (folder / "records").is_dir() and any(folder.rglob("distill.json"))


def read_distillations(folder: Path) -> Cells:
    """The students of all runs of `capgap distill` in a folder, at any depth. Those that `capgap
    train` trained alike without a teacher are their baselines.

    init: `pruned` for a student that was cut out of its teacher, else `fixed`. Students whose sizes
    differ by at most 5% make a curve. UserError for broken records, for runs on other text or with
    other settings, and as `read_table`.
    """
    excluded: list[Excluded] = []
    rows: list[dict[str, Any]] = []
    runs, trained = _runs(folder, "distill"), _runs(folder, "train")
    first = next(iter(runs))
    for where, run in runs.items():
        if key := _difference(runs[first], run):
            raise UserError(
                f"{folder}: the runs {first} and {where} have another {key}, so that their losses "
                "cannot be compared: put them into folders of their own"
            )
        if not run["finished"]:
            excluded.append(Excluded(id=where, reason="not finished"))
            continue
        alike = [one for one in trained.values() if not _difference(one, run, "tokens", "seed")]
        baselines = {_start(one): one["heldout"] for own in alike for one in own["after"].values()}
        for name, student in run["after"].items():
            if student["failure"]:
                reason = f"failed: {student['failure']['message']}"
                excluded.append(Excluded(id=f"{where}/{name}", reason=reason))
                continue
            try:
                row = _row_of(run, student, baselines.get(_start(student)))
            except KeyError as error:
                raise UserError(
                    f"{where}/distill.json has no {error}: a run of an older version has to be "
                    "made again"
                ) from None
            rows.append(row | {"where": f"{where}/{name}"})
    size, sizes = 0, {}
    for reached in sorted({row["student_parameters"] for row in rows}):
        size = sizes[reached] = size if reached <= SAME_SIZE * size else reached
    for row in rows:
        row["student_size"] = sizes[row["student_parameters"]]
    return _cells(pandas.DataFrame(rows), folder, excluded)


def _runs(folder: Path, command: str) -> dict[str, dict[str, Any]]:
    """The records by the folders that they lie in; only distill.json is sure to be a record."""
    runs = {}
    for path in sorted(folder.rglob(f"{command}.json")):
        try:
            record = read_json(path)
        except UserError:
            if command == "train":
                continue
            raise
        if command == "distill" or "after" in record:
            runs[str(path.parent.relative_to(folder.parent))] = record
    return runs


def _difference(one: dict[str, Any], other: dict[str, Any], *more: str) -> str | None:
    """The first setting in which two runs differ."""
    asked, others = ({**run["asked"], **run["asked"]["training"]} for run in (one, other))
    keys = ("corpus_hash", "shares", "window", *more, *one["asked"]["training"])
    return next((k for k in keys if k in others and asked.get(k) != others[k]), None)


def _start(student: dict[str, Any]) -> tuple[object, ...]:
    return tuple(student.get(key) for key in ("architecture", "non_embedding", "cut_from"))


def _row_of(
    run: dict[str, Any], student: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    asked, teacher = run["asked"], run["teacher"]
    tokens = _documents(student["heldout"], "tokens")
    documents = [
        np.full_like(tokens, nan) if heldout is None else _documents(heldout, "losses")
        for heldout in (student["heldout"], teacher["heldout"], baseline)
    ]
    means = [losses.sum() / tokens.sum() for losses in documents]
    return {
        **{name: field.default for name, field in _Row.model_fields.items()},
        **dict(zip(LOSSES, means, strict=True)),
        "architecture": student["architecture"],
        "init": "pruned" if student["cut_from"] == teacher["hash"] else "fixed",
        "tokens": asked["tokens"],
        "seed": asked["seed"],
        "student_parameters": student["non_embedding"],
        "teacher_parameters": teacher["non_embedding"],
        "teacher_size": teacher["non_embedding"],
        "teacher": teacher["hash"],
        "documents": documents,
        "document_tokens": tokens,
    }


def _documents(heldout: dict[str, Any], what: str) -> Floats:
    """Summed nats (`losses`) or `tokens` [documents]; the sources of a mixture weigh as their
    shares."""
    found = []
    for source in heldout.get("sources", {"": heldout}).values():
        weight = source.get("share", 1.0) * heldout["tokens"] / source["tokens"]
        found += [weight * number for number in source[f"document_{what}"]]
    return np.array(found)
