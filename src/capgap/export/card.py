"""The model card: README.md with the front matter that the Hugging Face Hub reads, and the licence
that a student inherits from its teacher: read and said, never made up.

One text for every model that capgap hands on, card.md.j2: filled in here from the records of a
sweep, in `facts.py` from those of a model folder.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from capgap.artifact import read_json
from capgap.corpus.names import HUB_SECONDS, at_revision, cached_file
from capgap.models.stored import LICENCES
from capgap.records import RunRecord, read_records
from capgap.sizes import format_count

CARD = "README.md"
# The id of a licence on the Hugging Face Hub, and what the beginning of its text says
_LICENCE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"\bMIT License\b|Permission is hereby granted, free of charge, to any person",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE",
    "llama3.2": r"LLAMA 3\.2 COMMUNITY LICENSE",
    "llama3.3": r"LLAMA 3\.3 COMMUNITY LICENSE",
    "llama3": r"META LLAMA 3 COMMUNITY LICENSE",
    "gemma": r"Gemma Terms of Use",
    "cc-by-sa-4.0": r"Attribution-ShareAlike 4\.0 International",
    "cc-by-4.0": r"Attribution 4\.0 International",
}


@dataclass(frozen=True)
class Licence:
    """`id` as the Hub names it, None where it is unknown; `source` says where it was read, or why
    it is not known. `name` and `link` belong to licences that the Hub has no id for."""

    id: str | None
    source: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Loss:
    """A row of held-out losses: nats per token, bits per byte."""

    what: str
    non_embedding: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says; what is None or empty is left out.

    `base_model`: the teacher's name on the Hub; `made`: the lines of how it was made;
    `benchmarks`: by name what evaluate.json says of each, with the same keys, of which some may be
    missing; `benchmarks_before`: they are of a model that this one began as.
    """

    name: str
    architecture: str
    non_embedding: int
    total: int
    licence: Licence
    teacher: str | None = None
    teacher_non_embedding: int | None = None
    base_model: str | None = None
    made: tuple[str, ...] = ()
    heldout_tokens: int | None = None
    losses: tuple[Loss, ...] = ()
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    six_benchmark_mean: float | None = None
    benchmarks_before: bool = False
    has_chat_template: bool = False


def card_text(card: Card) -> str:
    """The whole README.md with its front matter, which has scores of benchmarks as the Hub's
    `model-index`. Text from outside is no markup in it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "one_line": _one_line,
        "escaped": lambda text: re.sub(r"([\\`*\[\]<>|#])", r"\\\1", text),
        "cell": lambda text: _one_line(text or "").replace("|", "/"),
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),
        "count": lambda number: "" if number is None else format_count(number),
        "whole": lambda number: "" if number is None else f"{number:,}",
        "loss": lambda loss: "not measured" if loss is None else f"{loss:.3f}",
        "measured": _measured,
    }
    template = resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(card=card, front_matter=_front_matter(card))


def _front_matter(card: Card) -> str:
    """YAML, with the benchmarks as the Hub's `model-index`, where they are of this very model."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_args=None if row.get("shots") is None else {"num_few_shot": row["shots"]},
            metric_type=row.get("metric") or "score",
            metric_value=row["score"],
        )
        for name, row in card.benchmarks.items()
        if row.get("score") is not None and not card.benchmarks_before
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=card.licence.id,
        license_name=card.licence.name,
        license_link=card.licence.link,
        base_model=card.base_model,
        tags=["distillation", "capgap"],
        model_name=card.name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _measured(score: float | None, stderr: float | None = None, reason: str | None = None) -> str:
    """A share of 1 in percent; a perplexity, say, as it is."""
    if score is None:
        return f"not measured: {reason or 'no reason told'}"
    numbers = [score] if stderr is None else [score, stderr]
    is_share = 0 <= score <= 1
    return " ± ".join(f"{100 * one:.1f}%" if is_share else f"{one:.4g}" for one in numbers)


def _one_line(text: str) -> str:
    """A name may hold line breaks: what follows them would be markup of the card's own."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def sweep_card(recipe: dict[str, Any], best: RunRecord, records: Sequence[RunRecord]) -> Card:
    """The card of a sweep's best student; `recipe` as sweep.json holds it. The licence is that of
    text and teacher, which a sweep does not know."""
    assert best.heldout is not None
    assert best.teacher_parameters is not None
    beginnings = {"fixed": "cut out of the smallest teacher", "scratch": "random weights"}
    start = beginnings.get(str(best.init), f"cut out of {best.teacher}")
    if best.assistant is not None:
        size, tokens = best.assistant.parameters.non_embedding, best.assistant.tokens
        start = (
            f"cut out of an assistant of {format_count(size)}, which was cut out of {best.teacher},"
            f" distilled from it on {format_count(tokens)} tokens, and then was the teacher"
        )
    # where it lies is nobody's business
    source = Path(recipe["corpus"]["source"]).name
    made = (
        f"recipe: `{recipe['name']}` of a capgap sweep; text: `{source}`, "
        f"{format_count(best.steps * best.batch_tokens)} tokens",
        f"start: {start}",
        objective(best.alpha, best.divergence, best.temperature),
        f"peak learning rate {best.learning_rate:g}, batches of {best.batch_tokens} tokens, seed "
        f"{best.seed}",
    )

    def is_baseline(one: RunRecord) -> bool:
        alike = (one.init, one.student_size, one.tokens, one.seed)
        is_same = alike == (best.init, best.student_size, best.tokens, best.seed)
        return one.kind == "baseline" and is_same and one.teacher in (None, best.teacher)

    alone = "the same student by cross-entropy alone"
    rows = [("this student", best)]
    rows += [("its teacher", one) for one in records if one.id == best.teacher]
    rows += [(alone, one) for one in records if is_baseline(one)]
    return Card(
        name=best.id,
        architecture=best.architecture,
        non_embedding=best.parameters.non_embedding,
        total=best.parameters.total,
        licence=Licence(None, "a sweep does not know that of its teachers and its text"),
        teacher=best.teacher,
        teacher_non_embedding=best.teacher_parameters.non_embedding,
        made=made,
        heldout_tokens=best.heldout.tokens,
        losses=tuple(
            Loss(what, one.parameters.non_embedding, one.heldout.loss, one.heldout.bits_per_byte)
            for what, one in rows
            if one.heldout is not None
        ),
    )


def card_of_student(folder: Path) -> Card | None:
    """That of OUT/student, from what lies in OUT; None where it is no student of a sweep."""
    marker = folder.resolve().parent / "sweep.json"
    if folder.resolve().name != "student" or not marker.is_file():
        return None
    sweep = read_json(marker)
    records = read_records(marker.parent)
    cell = (sweep.get("best") or {}).get("cell")
    best = next((record for record in records if record.id == cell), None)
    return None if best is None else sweep_card(sweep["recipe"], best, records)


def objective(alpha: float, divergence: str, temperature: float) -> str:
    """The line of how a student learnt from its teacher."""
    teacher = f"{alpha:g} {divergence} to the teacher at temperature {temperature:g}"
    return f"loss: {1 - alpha:g} cross-entropy + {teacher}"


def find_licence(models: Iterable[tuple[str, str]]) -> Licence:
    """The first licence among (what it is, folder or name on the Hub), such as ("the teacher",
    "EleutherAI/pythia-410m"); Licence(None, why) where none tells one."""
    reasons = []
    for what, name in models:
        folder = Path(name)
        if folder.is_dir():
            licence = _in_folder(what, folder)
        elif is_on_hub(name):
            licence = _on_hub(what, name)
        else:
            licence = Licence(None, f"{what} {folder.name!r} is not there any more")
        if licence.id is not None:
            return licence
        reasons.append(licence.source)
    return Licence(None, "; ".join(reasons) or "no teacher is known")


def is_on_hub(name: str) -> bool:
    """Whether it was loaded from the Hub here: the name of a folder that is gone may be that of a
    stranger's model there."""
    return not Path(name).exists() and cached_file(name, "config.json") is not None


def _in_folder(what: str, folder: Path) -> Licence:
    if (folder / CARD).is_file():
        source = f"the model card of {what} {folder.name!r}"
        licence = _from_card(front_matter(folder / CARD), source)
        if licence is not None:
            return licence
    for path in sorted(folder.glob(LICENCES[0])):
        source = f"{path.name} of {what} {folder.name!r}"
        text = path.read_text(errors="replace")[:3000]
        for id, pattern in _LICENCE_TEXTS.items():
            if re.search(pattern, text, re.IGNORECASE):
                return Licence(id, source)
        # the first line, as the short name that the Hub wants
        title = next((line for line in text.splitlines() if line.strip()), "licence")
        name = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")[:60]
        return Licence("other", source, name=name, link=path.name)
    return Licence(None, f"{what} {folder.name!r} tells none")


def _on_hub(what: str, name: str) -> Licence:
    """From the card in the cache, or by one request."""
    from huggingface_hub import HfApi

    source = f"the model card of {what} {name!r}"
    try:
        cached = cached_file(name, CARD)
        if cached is not None:
            fields = front_matter(cached)
        else:
            repository, revision = at_revision(name)
            found = HfApi().model_info(repository, revision=revision, timeout=HUB_SECONDS)
            card = found.card_data
            fields = {} if card is None else card.to_dict()
    # The client raises errors of whatever HTTP library it is built on: the licence is then unknown,
    # and that is said
    except Exception:
        return Licence(None, f"{source} could not be read: no network, or no access")
    return _from_card(fields, source) or Licence(None, f"{source} tells none")


def _from_card(fields: dict[str, Any], source: str) -> Licence | None:
    id = fields.get("license")
    if isinstance(id, list):
        id = id[0] if len(id) == 1 else None
    if not isinstance(id, str) or id in ("", "unknown"):
        return None
    return Licence(id, source, name=fields.get("license_name"), link=fields.get("license_link"))


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; {} where there is none or it cannot be read."""
    import yaml

    # a byte that is no UTF-8 in its text says nothing of its head
    text = card.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        fields = yaml.safe_load(head[1]) if head is not None else None
    except (ValueError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}
