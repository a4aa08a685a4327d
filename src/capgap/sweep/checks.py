"""What can be known to be wrong before any work: the output folder, its records, disk, text."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capgap.config import Recipe
from capgap.corpus.sources import open_source
from capgap.errors import UserError
from capgap.locking import LOCK, locked_folder
from capgap.records import RunRecord, read_record, read_records
from capgap.sweep.context import Context
from capgap.sweep.plan import Cell, Column, Plan, Teacher

# Weights, two moments and a copy on the way to disk
BYTES_PER_PARAMETER = 16


def check_sources(recipe: Recipe, out: Path | None = None) -> None:
    """UserError if there is no such text, or if the sweep would write its files among the text."""
    asked = recipe.corpus
    for name in (asked.source, asked.heldout_source):
        if name is None:
            continue
        source = open_source(name, text_column=asked.text_column, separator=asked.separator)
        if out is None:
            continue
        folder = out.expanduser().resolve()
        roots = [source.root] if source.root is not None else []
        for text in (*roots, *source.files):
            place = text.resolve()
            if place in (folder, *folder.parents) or folder in place.parents:
                raise UserError(
                    f"the output folder {out} and the corpus {name} lie in one another, so the "
                    "sweep's own files would become text: choose another --out"
                )


@contextmanager
def claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """The folder belongs to this recipe and, while inside, to this process alone.

    A sweep of another recipe that has done nothing yet gives way: its first try failed, and the
    mistake is mended now. UserError: the folder is something else's, in use, or not writable.
    """
    if _is_foreign(out):
        raise UserError(f"{out} is no empty folder and no sweep: choose another --out")
    with locked_folder(out):
        _refuse_other_recipe(out, recipe)
        yield


def _is_foreign(out: Path) -> bool:
    """A file, or a folder with something in it that no sweep began."""
    if not out.exists() or (out / LOCK).exists() or (out / "sweep.json").exists():
        return False
    return not out.is_dir() or any(out.iterdir())


def _refuse_other_recipe(out: Path, recipe: Recipe) -> None:
    marker = out / "sweep.json"
    if not marker.exists():
        return
    found = _read_marker(marker)
    if found["recipe_hash"] == recipe.hash():
        return
    if "begin_windows" not in found["recipe"].get("corpus", {}):
        raise UserError(
            f"{out} holds a sweep of a version whose texts did not begin as the teachers' own do: "
            "choose another --out and run it again"
        )
    if any(out.glob("records/*/record.json")) or any(out.glob("work/checkpoints/*")):
        raise UserError(
            f"{out} holds the sweep of another recipe ({found['recipe']['name']}, hash "
            f"{found['recipe_hash']}; this one is {recipe.hash()}): choose another --out"
        )
    marker.unlink()


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        found = json.loads(marker.read_text())
        known = isinstance(found["recipe_hash"], str) and isinstance(found["recipe"]["name"], str)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{marker} was not written by a sweep: mend it, or choose another --out")
    return found


def check_records(context: Context, plan: Plan) -> list[RunRecord]:
    """The records that are there; UserError if one is broken or is not what would be run now."""
    if not (context.out / "records").is_dir():
        return []
    cells = [cell for column in (*plan.columns, *plan.baselines) for cell in column.cells]
    runs: list[Teacher | Cell] = [*plan.teachers, *cells]
    planned = {run.id: run for run in runs}
    records = read_records(context.out)
    for record in records:
        run = planned.get(record.id)
        what = None
        if run is None or record.recipe_hash != context.recipe.hash():
            what = "another recipe"
        elif (record.shape, record.learning_rate) != (vars(run.shape), run.learning_rate):
            # the rules behind `auto` and the ladder may change from version to version
            what = f"capgap {record.versions.get('capgap')} with another shape or learning rate"
        if what is not None:
            raise UserError(
                f"{context.record_folder(record.id)} was made by {what}: choose another --out, "
                "or delete that folder to have the run made again"
            )
    return records


def check_disk(context: Context, plan: Plan) -> None:
    """UserError if what is not recorded yet would not fit."""
    stored: list[Teacher | Cell] = [one for one in plan.teachers if one.source is None]
    missing = [
        run.shape.parameters().total
        for run in (*stored, *plan.cells)
        if not context.is_recorded(run.id)
    ]
    missing += [
        cell.assistant.shape.parameters().total
        for cell in plan.cells
        if cell.assistant is not None and not context.is_recorded(cell.id)
    ]
    needed = sum(missing) * BYTES_PER_PARAMETER
    free = shutil.disk_usage(context.out).free
    if free < needed:
        raise UserError(
            f"no disk space: {context.out} has {free / 1e9:.3g} GB free, the sweep needs about "
            f"{needed / 1e9:.3g} GB: free some or choose another --out"
        )


def lost_teachers(context: Context, plan: Plan, columns: Sequence[Column]) -> list[Teacher]:
    """Recorded teachers that the columns need, but whose files were deleted since."""
    needed = {teacher for column in columns for teacher in column.teachers}
    return [
        teacher
        for teacher in plan.teachers
        if teacher.id in needed
        and context.is_recorded(teacher.id)
        and not _is_usable(context, teacher)
    ]


def _is_usable(context: Context, teacher: Teacher) -> bool:
    if read_record(context.record_folder(teacher.id)).status == "failed":
        return True  # there is nothing to find: its cells are recorded as failed too
    has_weights = teacher.source is not None or context.teacher_folder(teacher.id).is_dir()
    return has_weights and context.importance_file(teacher.id).exists()
