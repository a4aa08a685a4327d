"""What can be known to be wrong before any work: the output folder, its records, disk, text."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capgap.artifact import LOCK, check_empty, flat, locked, read_json
from capgap.corpus.sources import open_source
from capgap.corpus.tokens import Corpus
from capgap.errors import UserError
from capgap.mirror import is_there
from capgap.records import RECORD_FILE, RunRecord, read_record, read_records
from capgap.scrub import scrub
from capgap.sweep.cells import SEARCH_FILE, Cell, Column, Context, Task, Teacher
from capgap.sweep.plan import Plan, make_plan
from capgap.sweep.recipe import Recipe, identity

# Keys that say which runs there are, and not what a run is: they may change in one folder as long
# as what is there stays as it is
GROWING = (
    "seeds",
    "architectures",
    "teachers.sizes",
    "teachers.models",
    "students.sizes",
    "students.tokens",
    "students.inits",
    "students.control_tokens",
    "baselines",
    "equal_flops",
    "corpus.max_epochs",
)
# Weights, two moments and a copy on the way to disk
BYTES_PER_PARAMETER = 16


def check_sources(recipe: Recipe, out: Path | None = None) -> None:
    """UserError if there is no such text, or if the sweep would write its files among the text."""
    asked = recipe.corpus
    folder = None if out is None else out.expanduser().resolve()
    for name in (asked.source, asked.heldout_source):
        if name is None:
            continue
        source = open_source(name, text_column=asked.text_column, separator=asked.separator)
        for text in filter(None, (source.root, *source.files)):
            path = text.resolve()
            if folder and (path in (folder, *folder.parents) or folder in path.parents):
                raise UserError(
                    f"the output folder {out} and the corpus {name} lie in one another, so the "
                    "sweep's own files would become text: choose another folder"
                )


@contextmanager
def claimed(out: Path, recipe: Recipe, *, grown: Plan | None = None) -> Iterator[list[str]]:
    """The folder belongs to this recipe and, while inside, to this process alone.

    Gives the hashes of the recipes that this one has grown out of in this folder: where a `grown`
    plan of it is given, every run of the sweep that is there must be part of it as it is. A sweep
    of another recipe that has done nothing yet gives way: its first try failed, and the mistake is
    mended now. UserError: the folder is something else's, in use, or not writable.
    """
    if not (out / LOCK).exists() and not (out / "sweep.json").exists():
        check_empty(out)
    with locked(out):
        yield _earlier_recipes(out, recipe, grown)


def _earlier_recipes(out: Path, recipe: Recipe, grown: Plan | None) -> list[str]:
    marker = out / "sweep.json"
    if not marker.exists():
        return []
    found = read_json(marker, recipe=dict, recipe_hash=str)
    earlier: list[str] = found.get("grown_from", [])
    if found["recipe_hash"] == recipe.hash():
        return earlier
    if "begin_windows" not in found["recipe"].get("corpus", {}):
        raise UserError(
            f"{out} holds a sweep of a version whose texts did not begin as the teachers' own do: "
            "choose another folder and run it again"
        )
    if not any(out.glob("records/*/record.json")) and not any(out.glob("work/checkpoints/*")):
        marker.unlink()
        return []
    if (out / SEARCH_FILE).exists():
        grown = None  # its rounds would have been others
    _refuse_other_recipe(out, found["recipe"], recipe, grown)
    return [*earlier, found["recipe_hash"]]


def _refuse_other_recipe(
    out: Path, before: dict[str, Any], recipe: Recipe, grown: Plan | None
) -> None:
    """UserError unless the recipe is the one `before` with other seeds, teachers, students, budgets
    or baselines, every recorded run is part of it, and no run is another than it was."""
    there = flat(identity({"students": {}} | before))
    here = flat(identity(scrub(recipe.model_dump(mode="json"))))
    changed = [key for key in here | there if here.get(key) != there.get(key)]
    if not changed:
        return
    refused = [key for key in changed if grown is None or key not in GROWING]
    if not set(there.get("teachers.models") or ()) <= set(recipe.teachers.models):
        refused.append("teachers.models")

    def refusal(keys: Sequence[str], why: str = "") -> UserError:
        values = (
            f"{key} is {json.dumps(there.get(key))} there and {json.dumps(here.get(key))} here"
            for key in keys
        )
        return UserError(
            f"{out} holds the sweep of another recipe ({before['name']}): {', '.join(values)}"
            f"{why and f', so that {why}'}: choose another folder"
        )

    if refused or grown is None:
        raise refusal(refused[:1])

    def is_recorded(run: Teacher | Cell) -> bool:
        return (out / "records" / run.id / RECORD_FILE).exists()

    try:
        old_recipe = Recipe.model_validate(identity(before) | {"name": before["name"]})
        models = old_recipe.teachers.models
        old_plan = make_plan(old_recipe, [one for one in grown.teachers if one.source in models])
    except (ValidationError, UserError):
        raise refusal(changed, "what is there cannot be read by this version") from None
    after = grown.runs
    for name, run in old_plan.runs.items():
        if run != after.get(name, run) or (name not in after and is_recorded(run)):
            raise refusal(changed, f"{name} {_what_becomes(run, after.get(name))}")
    if recipe.baselines == "all" or not any(map(is_recorded, old_plan.baseline_cells)):
        return
    moving = ["seeds", "teachers.sizes", "teachers.models"]
    if old_recipe.baselines != "best":
        moving.append("baselines")
    if set(moving) & set(changed):
        raise refusal(changed, "others may get the baselines (all do with baselines=all)")


def _what_becomes(before: Teacher | Cell, after: Teacher | Cell | None) -> str:
    if after is None:
        return "would be no part of it"
    if isinstance(before, Cell) and isinstance(after, Cell):
        old, new = before.cut_from, after.cut_from
        if old is not None and new is not None and old.id != new.id:
            return f"would be cut out of {new.id}, and no more out of {old.id}"
    return "would be another run"


def check_records(context: Context, plan: Plan, earlier: Sequence[str]) -> list[RunRecord]:
    """The records that are there; UserError if one is broken or is not what would be run now.
    `earlier`: hashes of the recipes that this one has grown out of."""
    if not (context.out / "records").is_dir():
        return []
    planned = plan.runs
    hashes = {context.recipe.hash(), *earlier}
    records = read_records(context.out)
    for record in records:
        run = planned.get(record.id)
        what = None
        if run is None or record.recipe_hash not in hashes:
            what = "another recipe"
        elif (record.shape, record.learning_rate) != (vars(run.shape), run.learning_rate):
            # the rules behind `auto` and the ladder may change from version to version
            what = f"capgap {record.versions.get('capgap')} with another shape or learning rate"
        if what is not None:
            raise UserError(
                f"{context.record_folder(record.id)} was made by {what}: choose another folder, "
                "or delete that folder to have the run made again"
            )
    return records


def check_epochs(corpus: Corpus, tokens: int, max_epochs: float) -> None:
    """UserError: `tokens` are more than `max_epochs` passes over the training part."""
    epochs = corpus.epochs(tokens)
    if epochs > max_epochs:
        raise UserError(
            f"{tokens} training tokens are {epochs:.1f} epochs of the corpus "
            f"({corpus.train_tokens} tokens in {corpus.directory}), more than {max_epochs:g}: take "
            "a larger corpus, fewer tokens, or allow more epochs"
        )


def check_disk(context: Context, plan: Plan) -> None:
    """UserError if what is not recorded yet would not fit."""
    runs: list[Teacher | Cell] = [*plan.teachers, *plan.cells]
    works = [run.work for run in runs if not context.is_recorded(run.id)]
    # a teacher that exists takes no tokens
    trained = [shape for work in works for shape, tokens in work.trained if tokens]
    needed = BYTES_PER_PARAMETER * sum(shape.parameters().total for shape in trained)
    free = shutil.disk_usage(context.out).free
    if free < needed:
        raise UserError(
            f"no disk space: {context.out} has {free / 1e9:.3g} GB free, the sweep needs about "
            f"{needed / 1e9:.3g} GB: free some or choose another folder"
        )


def lost_teachers(context: Context, plan: Plan, columns: Sequence[Column]) -> list[Teacher]:
    """Recorded teachers that the columns need, but whose files were deleted since."""
    needed = {teacher for column in columns for teacher in column.teachers}
    recorded = [one for one in plan.teachers if context.is_recorded(one.id) and one.id in needed]
    return [teacher for teacher in recorded if is_lost(context, teacher)]


def is_lost(context: Context, task: Task) -> bool:
    """Whether it is a recorded teacher without its files."""
    # of one that failed there is nothing to find: its cells are recorded as failed too
    if isinstance(task, Column) or read_record(context.record_folder(task.id)).status == "failed":
        return False
    has_weights = task.source is not None or is_there(context.teacher_folder(task.id))
    return not has_weights or not is_there(context.importance_file(task.id))
