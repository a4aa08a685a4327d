"""From records to what a person takes home: tables, the law, the best student, the report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from capgap.corpus.tokens import Corpus
from capgap.errors import UserError
from capgap.evaluate.sample import sample_text
from capgap.export.card import CARD, card_text, sweep_card
from capgap.models.build import load_model
from capgap.models.stored import positions_of
from capgap.records import RunRecord, read_records, write_json_atomically
from capgap.sweep.context import Context
from capgap.sweep.plan import Plan
from capgap.sweep.summary import fit_tables

SAMPLES = 3
PROMPT_TOKENS = 24
SAMPLE_TOKENS = 80


def best_of(context: Context, plan: Plan, corpus: Corpus) -> dict[str, str] | None:
    """Writes grid.csv, law.json, and of the cell with the lowest held-out loss student/ and
    samples.json. Returns the ids of that cell and its teacher; None if no cell was finished."""
    fit_tables(context.out)
    records = read_records(context.out)
    losses = {
        record.id: record.heldout.loss
        for record in records
        if record.kind == "cell" and record.heldout is not None
    }
    if not losses:
        return None
    lowest = min(losses, key=losses.__getitem__)
    best = next(record for record in records if record.id == lowest)
    assert best.teacher is not None
    _export_student(context, best, records)
    _write_samples(context, plan, corpus, best)
    return {"cell": best.id, "teacher": best.teacher}


def clear_work(context: Context) -> None:
    """What is not needed any more: weights of the other students, states of killed runs."""
    for name in ("students", "checkpoints"):
        shutil.rmtree(context.out / "work" / name, ignore_errors=True)


def _export_student(context: Context, best: RunRecord, records: Sequence[RunRecord]) -> None:
    trained = context.student_folder(best.id)
    target = context.out / "student"
    if not trained.exists():
        if not target.exists():
            raise UserError(
                f"{target} was deleted, and with it the weights of the best student: delete "
                f"{context.record_folder(best.id)} too, and the same command makes it again"
            )
        return  # exported by an earlier call
    partial = context.out / ".student.partial"
    for leftover in (partial, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    shutil.copytree(trained, partial)
    card = sweep_card(context.recipe.model_dump(mode="json"), best, records)
    (partial / CARD).write_text(card_text(card))
    partial.rename(target)


def _write_samples(context: Context, plan: Plan, corpus: Corpus, best: RunRecord) -> None:
    """Continuations of the beginnings of held-out documents, by the student and its teacher."""
    teacher = next(one for one in plan.teachers if one.id == best.teacher)
    source = teacher.source or context.teacher_folder(teacher.id)
    if not Path(source).exists() and teacher.source is None:
        return  # deleted since an earlier call, which has written the samples
    tokenizer = corpus.tokenizer
    writers = [
        ("student", best.id, load_model(context.out / "student").eval()),
        ("teacher", teacher.id, load_model(source).eval()),
    ]
    positions = min(positions_of(model.config) or PROMPT_TOKENS * 8 for _, _, model in writers)
    prompt_tokens = min(PROMPT_TOKENS, positions // 2)
    length = min(SAMPLE_TOKENS, positions - prompt_tokens - 1)
    texts = [
        {
            "who": who,
            "id": name,
            "prompt": prompt,
            "text": sample_text(model, tokenizer, prompt, max_new_tokens=length),
        }
        for prompt in _prompts(corpus, tokenizer, prompt_tokens)
        for who, name, model in writers
    ]
    write_json_atomically(context.out / "samples.json", {"texts": texts})


def _prompts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    documents: list[Any] = [
        document for document in corpus.heldout_documents() if len(document.tokens) > 2 * length
    ]
    return [
        tokenizer.decode(document.tokens[1 : length + 1].tolist())
        for document in documents[:SAMPLES]
    ]
