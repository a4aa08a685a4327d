"""One tidy table of cells, from a sweep's records or from a CSV that anybody may have published.

A cell is one distilled student. Sizes are non-embedding parameters, losses nats per token.
"""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from capgap.errors import UserError, check_regular
from capgap.law.law import Excluded
from capgap.law.model import Floats
from capgap.records import RunRecord, read_records, write_text_atomically
from capgap.sizes import format_count, parse_count

REQUIRED = ("tokens", "student_parameters", "teacher_parameters", "loss")
# what a table may leave away, and what is not known then
LOST = {
    "teacher": "one training of every size is assumed to have taught all seeds",
    "seed": "every row counts as a run of one seed",
    "loss_stderr": "the losses' own standard errors are not known",
    "teacher_loss": "whether the teachers improve as they grow is not known",
    "baseline_loss": "what distilling gains is not known",
}
NAMES = ("architecture", "init")
OPTIONAL = (*NAMES, *LOST, "teacher_tokens", "tokenizer", "vocabulary")
COUNTS = ("tokens", "student_parameters", "teacher_parameters")
LOSSES = ("loss", "loss_stderr", "teacher_loss", "baseline_loss")
# Sizes of one architecture further apart than this are taken for a mixture of units
WIDEST_RANGE = 1e4
SMALLEST_MODEL = 1_000
SAME_LOSS = 1e-9  # two rows of one place may differ by rounding
LARGEST_VOCABULARY = 1_000_000

# what a run must share with its baseline: the last entry is the size of the teacher that the
# initial weights were cut out of, None for `fixed` and `scratch`
BaselineKey = tuple[str, str | None, int, int | None, int, int | None]


@dataclass(frozen=True)
class Cells:
    """Finished cells, sorted by curve and teacher.

    frame: a row a cell, with the columns of KEYS, `student_parameters`, `teacher_parameters`,
    `teacher_tokens`, `loss_stderr`, and `training`, which names the training that made its teacher.
    Document arrays [cells, documents] hold summed nats, NaN where there is no such run; a table's
    losses count as those of one document of one token. equal_flops: baselines that have the cell's
    FLOPs in place of its tokens. own_errors: whether a table's `loss_stderr`
    is each cell's own noise. missing: columns that a table does not have.
    """

    frame: pandas.DataFrame
    cells: Floats
    baselines: Floats
    teachers: Floats
    document_tokens: Floats
    equal_flops: Floats | None = None
    own_errors: bool = False
    excluded: tuple[Excluded, ...] = ()
    missing: tuple[str, ...] = ()
    records: tuple[RunRecord, ...] = field(default=(), repr=False)

    @cached_property
    def losses(self) -> Floats:
        """[cells] nats per token."""
        return per_token(self.cells, self.document_tokens)


KEYS = ["architecture", "init", "tokens", "student_size", "teacher_size", "seed"]
CURVE = KEYS[:4]


def per_token(rows: Floats, tokens: Floats) -> Floats:
    """Nats per token [rows] from summed nats [rows, documents]."""
    return np.asarray(rows.sum(axis=-1) / tokens.sum())


def baseline_key(record: RunRecord) -> BaselineKey:
    """What a cell and its baseline share: architecture, init, tokens, student, seed and, where the
    weights were cut out of a cell's own teacher, that teacher's size."""
    cut_from = record.teacher_size if record.init in ("pruned", "chain") else None
    return (
        record.architecture,
        record.init,
        record.tokens,
        record.student_size,
        record.seed,
        cut_from,
    )


def baselines_by_key(records: Iterable[RunRecord]) -> dict[BaselineKey, RunRecord]:
    """Finished baselines, to be looked up with `baseline_key` of a cell.

    Raises UserError if two baselines claim the same place.
    """
    found: dict[BaselineKey, RunRecord] = {}
    for record in records:
        is_longer = record.equal_flops_to is not None
        if record.kind == "baseline" and record.status == "done" and not is_longer:
            _claim(found, baseline_key(record), record)
    return found


def load_cells(source: Path | str, *, independent_errors: bool = False) -> Cells:
    """The cells of a sweep's output folder, or of a table (`read_table`)."""
    source = Path(source)
    if not source.is_dir():
        return read_table(source, independent_errors=independent_errors)
    if independent_errors:
        raise UserError("--independent-errors is for tables; records hold every document")
    return cells_of(read_records(source))


def cells_of(records: Sequence[RunRecord]) -> Cells:
    """The finished cells of a sweep.

    Raises UserError if two cells claim one place of the grid, or if records of one architecture
    were evaluated on different held-out documents, which would make their losses incomparable.
    """
    done = [record for record in records if record.status == "done" and record.heldout]
    _check_documents(done)
    excluded = [
        Excluded(id=record.id, reason=f"failed: {record.failure.message}")
        for record in records
        if record.failure is not None and record.status == "failed"
    ]
    baselines = baselines_by_key(done)
    teachers = {record.id: record for record in done if record.kind == "teacher"}
    longer = {record.equal_flops_to: record for record in done if record.equal_flops_to}
    places: dict[Any, RunRecord] = {}
    for record in done:
        if record.kind != "cell":
            continue
        limit = math.log((record.shape or {}).get("vocabulary") or LARGEST_VOCABULARY)
        if record.heldout is not None and record.heldout.loss > limit:
            reason = f"its loss is above ln(vocabulary), {limit:.2f}: it has learnt nothing"
            excluded.append(Excluded(id=record.id, reason=reason))
            continue
        _claim(places, tuple(getattr(record, key) for key in KEYS), record)
    ordered = [places[place] for place in sorted(places)]
    above = [teachers.get(cell.teacher or "") for cell in ordered]
    rows = [
        {key: getattr(cell, key) for key in KEYS}
        | {
            "student_parameters": cell.parameters.non_embedding,
            "teacher_parameters": getattr(cell.teacher_parameters, "non_embedding", math.nan),
            "teacher_tokens": math.nan if one is None or one.tokens <= 0 else float(one.tokens),
            "training": cell.teacher,
            "loss_stderr": math.nan,
        }
        for cell, one in zip(ordered, above, strict=True)
    ]
    tokens = ordered[0].heldout.document_tokens if ordered and ordered[0].heldout else [1]
    frame = pandas.DataFrame(rows, columns=[*KEYS, *_EXTRA])
    return Cells(
        frame=frame,
        cells=_documents(ordered, len(tokens)),
        baselines=_documents([baselines.get(baseline_key(cell)) for cell in ordered], len(tokens)),
        teachers=_documents(above, len(tokens)),
        document_tokens=np.array(tokens, dtype=float),
        equal_flops=_documents([longer.get(cell.id) for cell in ordered], len(tokens)),
        excluded=tuple(excluded),
        records=tuple(records),
    )


_EXTRA = ["student_parameters", "teacher_parameters", "teacher_tokens", "training", "loss_stderr"]


def _documents(records: Sequence[RunRecord | None], number: int) -> Floats:
    """Summed nats [records, documents]; NaN rows for None."""
    rows = np.full((len(records), number), np.nan)
    for row, record in zip(rows, records, strict=True):
        if record is not None and record.heldout is not None:
            row[:] = record.heldout.document_losses
    return rows


def _claim(places: dict[Any, RunRecord], place: Any, record: RunRecord) -> None:
    other = places.setdefault(place, record)
    if other is not record:
        raise UserError(
            f"records {other.id} and {record.id} are the same run of the grid; "
            "keep one, or give them different seeds"
        )


def _check_documents(records: Sequence[RunRecord]) -> None:
    first: dict[str, RunRecord] = {}
    for record in records:
        other = first.setdefault(record.architecture, record)
        assert record.heldout is not None
        assert other.heldout is not None
        if record.heldout.document_tokens != other.heldout.document_tokens:
            raise UserError(
                f"records {other.id} and {record.id} were evaluated on different held-out "
                "documents, so their losses cannot be compared; evaluate them on the same corpus"
            )


def read_table(path: Path | str, *, independent_errors: bool = False) -> Cells:
    """Reads a table with the columns of docs/output.md, separated by commas, semicolons or tabs.

    `independent_errors`: whether `loss_stderr` is each cell's own, as for losses on texts of their
    own; else it is taken as common to the cells of a curve, as for losses on the same text.
    UserError names the line and the value: missing columns, values that are no numbers or no losses
    in nats per token, cells given twice with different losses, several tokenizers in one curve,
    sizes in several units, fewer than two teachers for every student.
    """
    path = Path(path)
    table, excluded = _cells_only(_load(path))
    if table.empty:
        raise UserError(f"{path} has no row of a finished cell")
    for name in COUNTS:
        table[name] = _counts(table, name, path)
    for name in LOSSES:
        if name in table:
            table[name] = _losses(table, name, path)
    _check_losses(table, path)
    table["seed"] = _seeds(table, path)
    for name in NAMES:
        if name not in table:
            table[name] = "unnamed"
        table[name] = table[name].str.strip()
        _refuse(path, table, table[name].eq(""), f"{name} is empty; name it")
    _check_units(table, path)
    for size, reached in (
        ("student_size", "student_parameters"),
        ("teacher_size", "teacher_parameters"),
    ):
        asked = size in table and bool((table[size].str.strip() != "").all())
        table[size] = _counts(table, size, path) if asked else table[reached]
    if "teacher_tokens" in table:
        known = table[table["teacher_tokens"].str.strip() != ""]
        counts = pandas.Series(_counts(known, "teacher_tokens", path), known.index, dtype=float)
        table["teacher_tokens"] = counts.reindex(table.index)
    else:
        table["teacher_tokens"] = math.nan
    sizes = table["teacher_size"].astype(str)
    table["training"] = (
        table["teacher"].where(table["teacher"] != "", sizes) if ("teacher" in table) else sizes
    )
    table, repeated = _without_repeats(table, path)
    _check_curves(table, path)
    sizes_of = table.groupby(["architecture", "training"])["teacher_size"].nunique()
    if (sizes_of > 1).any():
        name = sizes_of[sizes_of > 1].index[0][1]
        raise UserError(
            f"{path}: teacher {name!r} stands for several sizes: the column names the training "
            "that made a teacher, so every size has names of its own"
        )
    missing = tuple(name for name in LOST if name not in table)
    for name in LOSSES:
        if name not in table:
            table[name] = math.nan
    table = table.sort_values(KEYS, ignore_index=True)
    return Cells(
        frame=table[[*KEYS, *_EXTRA]],
        cells=table[["loss"]].to_numpy(float),
        baselines=table[["baseline_loss"]].to_numpy(float),
        teachers=table[["teacher_loss"]].to_numpy(float),
        document_tokens=np.ones(1),
        own_errors=independent_errors,
        excluded=tuple(excluded + repeated),
        missing=missing,
    )


def _load(path: Path) -> pandas.DataFrame:
    check_regular(path, "a table")
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = max(",;\t", key=header.count)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            table = pandas.read_csv(
                path,
                sep=separator,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                index_col=False,
                encoding="utf-8-sig",
            )
    except FileNotFoundError:
        raise UserError(f"no table {path}") from None
    except pandas.errors.ParserWarning:
        raise UserError(f"{path} has rows with more fields than column names") from None
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of comma-separated values ({error})") from None
    table.columns = [str(name).strip().lower() for name in table.columns]
    twice = sorted({name for name in table.columns if list(table.columns).count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}: keep one")
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has "
            f"{', '.join(table.columns)}. A table needs {', '.join(REQUIRED)}, and may have "
            f"{', '.join(OPTIONAL)}"
        )
    # a table whose fields are parted by semicolons or tabs may have commas in its decimals
    if separator != ",":
        for name in (*LOSSES, "seed"):
            if name in table:
                table[name] = table[name].str.replace(r"^(\d+),(\d+)$", r"\1.\2", regex=True)
    # line 1 of the file is the header
    table["line"] = np.arange(2, len(table) + 2)
    return table


def _cells_only(table: pandas.DataFrame) -> tuple[pandas.DataFrame, list[Excluded]]:
    """Of a sweep's grid.csv the cells that finished; any other table is cells alone."""
    excluded = []
    kinds = table["kind"] if "kind" in table else pandas.Series("cell", index=table.index)
    states = table["status"] if "status" in table else pandas.Series("done", index=table.index)
    for _, row in table[(kinds != "cell") | (states != "done")].iterrows():
        name = row.get("id") or f"line {row['line']}"
        kind = row.get("kind")
        reason = f"kind {kind!r}, status {row.get('status')!r}: no finished cell"
        if row.get("status") == "failed":
            reason = "failed"
        elif kind in ("teacher", "baseline"):
            reason = f"a {kind}: its loss is the {kind}_loss of the cells"
        excluded.append(Excluded(id=name, reason=reason))
    return table[(kinds == "cell") & (states == "done")].copy(), excluded


def _refuse(path: Path, table: pandas.DataFrame, wrong: pandas.Series, why: str) -> None:
    """UserError with the first line that is wrong, if any is."""
    if wrong.any():
        raise UserError(f"{path}, line {table.loc[wrong, 'line'].iloc[0]}: {why}")


def _counts(table: pandas.DataFrame, name: str, path: Path) -> list[int]:
    found = []
    for line, text in zip(table["line"], table[name], strict=True):
        # thousands may be parted by points, spaces or apostrophes
        plain = re.sub(r"[\s'\u2019]", "", text).removesuffix(".0")
        if re.fullmatch(r"\d{1,3}(\.\d{3})+", plain):
            plain = plain.replace(".", "")
        try:
            found.append(parse_count(plain))
        except UserError as error:
            raise UserError(f"{path}, line {line}: {name}: {error}") from None
    return found


def _losses(table: pandas.DataFrame, name: str, path: Path) -> pandas.Series:
    empty = table[name].str.strip() == ""
    if name == "loss":
        _refuse(path, table, empty, "loss is missing; take the row out")
    values = pandas.to_numeric(table[name].where(~empty), errors="coerce").astype(float)
    wrong = ~empty & ~((values > 0) & np.isfinite(values))
    if name == "loss_stderr":
        wrong &= values.ne(0)
    if wrong.any():
        value = table.loc[wrong, name].iloc[0]
        why = f"{name} {value!r} is no loss in nats per token: it must be a positive, finite number"
        _refuse(path, table, wrong, why)
    return values


def _check_losses(table: pandas.DataFrame, path: Path) -> None:
    """Perplexities, percentages and accuracies look like numbers too."""
    known = table["vocabulary"] if "vocabulary" in table else pandas.Series("", table.index)
    limits = pandas.to_numeric(known, errors="coerce").fillna(LARGEST_VOCABULARY)
    for name in ("loss", "teacher_loss", "baseline_loss"):
        if name not in table:
            continue
        above = table[name] > np.log(limits)
        if above.any():
            value, limit = table.loc[above, name].iloc[0], np.log(limits[above].iloc[0])
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


def _seeds(table: pandas.DataFrame, path: Path) -> pandas.Series:
    if "seed" not in table:
        return pandas.Series(0, index=table.index)
    values = pandas.to_numeric(table["seed"], errors="coerce")
    wrong = values.isna() | (values % 1 != 0)
    if wrong.any():
        why = f"seed {table.loc[wrong, 'seed'].iloc[0]!r} is no whole number"
        _refuse(path, table, wrong, why)
    return values.astype(int)


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
    table: pandas.DataFrame, path: Path
) -> tuple[pandas.DataFrame, list[Excluded]]:
    excluded, dropped = [], []
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
    return table.drop(index=dropped), excluded


def _check_curves(table: pandas.DataFrame, path: Path) -> None:
    if "tokenizer" in table:
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


def grid_table(records: Sequence[RunRecord]) -> pandas.DataFrame:
    """One row for each record, sorted by id: sizes in parameters, losses in nats per token.

    `gain` is the baseline's loss minus the cell's, `kl` and `agreement` are the last ones logged
    in training. Missing values are missing, also in the whole-number columns.
    """
    baselines = baselines_by_key(records)
    teachers = {record.id: record for record in records if record.kind == "teacher"}
    rows = [
        _row(record, baselines.get(baseline_key(record)), teachers.get(record.teacher or ""))
        for record in sorted(records, key=lambda record: record.id)
    ]
    table = pandas.DataFrame(rows)
    whole = {name: "Int64" for name in _WHOLE if name in table}
    # FLOPs of a large run exceed 64-bit integers, so those stay Python integers
    return table.astype(whole | {name: object for name in ("flops_total",) if name in table})


_WHOLE = (
    "seed",
    "tokens",
    "student_size",
    "student_parameters",
    "teacher_size",
    "teacher_parameters",
    "assistant_parameters",
)


def write_grid(records: Sequence[RunRecord], path: Path | str) -> None:
    """Write `grid_table(records)` as CSV in one atomic step; a missing value is an empty field."""
    write_text_atomically(path, grid_table(records).to_csv(index=False, lineterminator="\n"))


def _row(
    record: RunRecord, baseline: RunRecord | None, teacher: RunRecord | None
) -> dict[str, Any]:
    heldout, is_teacher = record.heldout, record.kind == "teacher"
    above = record.parameters if is_teacher else record.teacher_parameters
    names = ("id", "kind", "status", "architecture", "init", "seed", "tokens", "student_size")
    losses = ("loss", "loss_stderr", "bits_per_byte", "bits_per_byte_stderr")
    alone = baseline.heldout.loss if baseline is not None and baseline.heldout else None
    if record.kind != "cell":
        alone = None
    return {name: getattr(record, name) for name in names} | {
        "student_parameters": None if is_teacher else record.parameters.non_embedding,
        "teacher": record.id if is_teacher else record.teacher,
        "teacher_size": record.teacher_size,
        "teacher_parameters": above and above.non_embedding,
        "assistant_parameters": record.assistant and record.assistant.parameters.non_embedding,
        **{name: heldout and getattr(heldout, name) for name in losses},
        "teacher_loss": teacher.heldout.loss if teacher and teacher.heldout else None,
        "after_cut_loss": record.after_cut and record.after_cut.loss,
        "baseline_loss": alone,
        "gain": None if alone is None or heldout is None else alone - heldout.loss,
        "kl": _last(record.curve.kl),
        "agreement": _last(record.curve.agreement),
        "flops_total": record.flops.total,
        "wall_seconds": record.wall_seconds,
    }


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)
