"""From records to what a person takes home: tables, the law, the best student, the report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.artifact import folder_written, read_json, write_json
from capgap.corpus.tokens import Corpus
from capgap.errors import UserError
from capgap.law.data import cells_of, write_grid
from capgap.law.fit import fit
from capgap.law.law import read_law
from capgap.law.table import has_distillations, read_distillations
from capgap.mirror import fetch
from capgap.records import RunRecord, read_records
from capgap.report.page import write_law_report, write_report
from capgap.report.sentences import answer
from capgap.sweep.cells import SEARCH_FILE, Cell, Context
from capgap.sweep.plan import Plan

SAMPLES = 3
PROMPT_TOKENS = 24
SAMPLE_TOKENS = 80


def refresh(out: Path) -> dict[str, Any]:
    """Fits and draws again, as `capgap report`; returns paths and verdict. UserError where there is
    neither a sweep nor the runs of `capgap distill`."""
    if (out / "sweep.json").exists():
        if not any(out.glob("records/*/record.json")):
            raise UserError(f"no run of the sweep in {out} is finished yet: try again later")
        fit_tables(out)
        page = write_report(out)
    elif has_distillations(out):
        law = fit(read_distillations(out))
        write_json(out / "law.json", law.as_dict())
        page = write_law_report(law, out / "report.html", title=out.name)
    else:
        raise UserError(f"{str(out)!r} is no output folder of a sweep (it has no sweep.json)")
    return {"report": str(page), "law": str(out / "law.json"), "verdict": verdict_of(out)}


def fit_tables(out: Path) -> list[RunRecord]:
    """Writes grid.csv and law.json from the records, which it returns."""
    records = read_records(out)
    write_grid(records, out / "grid.csv")
    write_json(out / "law.json", fit(cells_of(records)).as_dict())
    return records


def verdict_of(out: Path) -> list[str]:
    """The answer of an output folder in sentences."""
    search = out / SEARCH_FILE
    trace = read_json(search) if search.exists() else None
    return answer(read_law(out / "law.json"), trace)


def best_of(context: Context, plan: Plan, corpus: Corpus) -> dict[str, str] | None:
    """Writes grid.csv, law.json, and of the cell with the lowest held-out loss student/ and
    samples.json. Returns the ids of that cell and its teacher; None if no cell was finished."""
    records = fit_tables(context.out)
    finished = [(one.heldout.loss, one) for one in records if one.kind == "cell" and one.heldout]
    if not finished:
        return None
    _, best = min(finished, key=lambda found: found[0])
    assert best.teacher is not None
    _export_student(context, best, records)
    _write_samples(context, plan, corpus, best)
    return {"cell": best.id, "teacher": best.teacher}


def best_cells(plan: Plan, records: Sequence[RunRecord]) -> list[Cell]:
    """For every curve the cells of the teacher whose students are best on average over seeds."""
    losses = {record.id: record.heldout.loss for record in records if record.heldout is not None}
    curves: dict[tuple[object, ...], dict[int, list[Cell]]] = {}
    for cell in plan.cells:
        if cell.id in losses and cell.teacher is not None:
            curves.setdefault(cell.curve, {}).setdefault(cell.teacher.size, []).append(cell)
    best = []
    for by_teacher in curves.values():
        best += min(by_teacher.values(), key=lambda cells: fmean(losses[one.id] for one in cells))
    return best


def _export_student(context: Context, best: RunRecord, records: Sequence[RunRecord]) -> None:
    from capgap.export.card import CARD, card_text, sweep_card

    trained = context.student_folder(best.id)
    fetch(trained)
    target = context.out / "student"
    if trained.exists():
        with folder_written(target) as partial:
            shutil.copytree(trained, partial, dirs_exist_ok=True)
            card = sweep_card(context.recipe.model_dump(mode="json"), best, records)
            (partial / CARD).write_text(card_text(card))
    elif not target.exists():  # else exported by an earlier call
        raise UserError(
            f"{target} was deleted, and with it the weights of the best student: delete "
            f"{context.record_folder(best.id)} too, and the same command makes it again"
        )


def _write_samples(context: Context, plan: Plan, corpus: Corpus, best: RunRecord) -> None:
    """Continuations of the beginnings of held-out documents, by the student and its teacher."""
    from capgap.evaluate.sample import sample_text
    from capgap.models.build import load_model
    from capgap.models.stored import positions_of

    teacher = next(one for one in plan.teachers if one.id == best.teacher)
    source = context.weights_of(teacher)
    if isinstance(source, Path):
        fetch(source)
    if not Path(source).exists() and teacher.source is None:
        return  # deleted since an earlier call, which has written the samples
    writers = [
        ("student", best.id, load_model(context.out / "student").eval()),
        ("teacher", teacher.id, load_model(source).eval()),
    ]
    positions = min(positions_of(model.config) or PROMPT_TOKENS * 8 for _, _, model in writers)
    prompt_tokens = min(PROMPT_TOKENS, positions // 2)
    length = min(SAMPLE_TOKENS, positions - prompt_tokens - 1)
    tokenizer = corpus.tokenizer
    documents: list[Any] = [
        one.tokens for one in corpus.heldout_documents() if len(one.tokens) > 2 * prompt_tokens
    ]
    prompts = [
        tokenizer.decode(tokens[1 : prompt_tokens + 1].tolist()) for tokens in documents[:SAMPLES]
    ]
    texts = [
        {
            "who": who,
            "id": name,
            "prompt": prompt,
            "text": sample_text(model, tokenizer, prompt, max_new_tokens=length),
        }
        for prompt in prompts
        for who, name, model in writers
    ]
    write_json(context.out / "samples.json", {"schema": 1, "texts": texts})


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """Of a corpus, without its long lists, which stay in corpus/manifest.json."""
    long = {"source": "files", "heldout_source": "files", "heldout": "evaluated"}
    kept = {key: value for key, value in manifest.items() if key != "request"}
    for part, name in long.items():
        if kept[part] is not None:
            kept[part] = {key: value for key, value in kept[part].items() if key != name}
    return kept
