"""The model card: README.md with the front matter that the Hugging Face Hub reads.

One text for every model that capgap hands on; `facts.py` and `from_sweep.py` fill it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capgap.export.licence import Licence
from capgap.sizes import format_count


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of held-out losses: nats per token, bits per byte; None where not measured."""

    what: str
    non_embedding: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of an evaluation; `reason` says why there is no score."""

    name: str
    score: float | None
    stderr: float | None = None
    metric: str | None = None
    shots: int | None = None
    samples: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says; what is None or empty is left out.

    `teacher` by name, `base_model` its name on the Hub, `made` the lines of how it was made;
    `benchmarks_before`: these are of a model that this one began as.
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
    benchmarks: tuple[Benchmark, ...] = ()
    six_benchmark_mean: float | None = None
    benchmarks_before: bool = False
    has_chat_template: bool = False


def card_text(card: Card) -> str:
    """The whole README.md."""
    parts = [
        _front_matter(card),
        f"# {_escaped(card.name)}",
        _introduction(card),
        _section("How it was made", _list(card.made)),
        _section(_loss_heading(card), _losses(card)),
        _section(_benchmark_heading(card), _benchmarks(card)),
        _section("Use", _use(card)),
        _section("Licence", _licence(card.licence)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    licence = card.licence
    if licence.id is not None:
        fields["license"] = licence.id
        if licence.name:
            fields["license_name"] = licence.name
        if licence.link:
            fields["license_link"] = licence.link
    if card.base_model is not None:
        fields["base_model"] = card.base_model
    fields["tags"] = ["distillation", "capgap"]
    # JSON is YAML, and quotes whatever needs it
    lines = [
        f"{key}: {value if _is_plain(value) else json.dumps(value, ensure_ascii=False)}"
        for key, value in fields.items()
    ]
    return "\n".join(["---", *lines, "---"])


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and value.replace("-", "").isalpha() and value.isascii()


def _introduction(card: Card) -> str:
    own = f"{format_count(card.non_embedding)} non-embedding parameters"
    text = f"A {card.architecture} model of {own} ({format_count(card.total)} in all)"
    if card.teacher is not None:
        size = card.teacher_non_embedding
        told = "" if size is None else f" ({format_count(size)})"
        text += f", distilled from `{_one_line(card.teacher)}`{told} with capgap"
    return text + "."


def _loss_heading(card: Card) -> str:
    tokens = card.heldout_tokens
    return "Held-out loss" + ("" if tokens is None else f" ({format_count(tokens)} tokens)")


def _losses(card: Card) -> str:
    rows = [
        (
            one.what,
            "" if one.non_embedding is None else format_count(one.non_embedding),
            _number(one.loss),
            _number(one.bits_per_byte),
        )
        for one in card.losses
    ]
    return _table(("", "parameters", "nats per token", "bits per byte"), rows)


def _benchmark_heading(card: Card) -> str:
    return "Benchmarks" + (" of a model that this one began as" if card.benchmarks_before else "")


def _benchmarks(card: Card) -> str:
    rows = [
        (
            one.name,
            one.metric or "",
            "" if one.shots is None else str(one.shots),
            "" if one.samples is None else f"{one.samples:,}",
            _measured(one),
        )
        for one in card.benchmarks
    ]
    if card.six_benchmark_mean is not None:
        rows.append(("mean of the six", "", "", "", _score(card.six_benchmark_mean)))
    return _table(("benchmark", "metric", "shots", "samples", "score"), rows)


def _measured(one: Benchmark) -> str:
    if one.score is None:
        return f"not measured: {one.reason or 'no reason told'}"
    error = "" if one.stderr is None else f" ± {_score(one.stderr, of=one.score)}"
    return _score(one.score) + error


def _score(score: float, *, of: float | None = None) -> str:
    """A share of 1 in percent; a perplexity, say, as it is. `of`: the score that this is the error
    of."""
    is_share = 0 <= (score if of is None else of) <= 1
    return f"{100 * score:.1f}%" if is_share else f"{score:.4g}"


def _use(card: Card) -> str:
    given = (
        'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello"}], '
        'add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        if card.has_chat_template
        else 'tokenizer("Once", return_tensors="pt")'
    )
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {json.dumps(card.name, ensure_ascii=False)}  # where this folder lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = {given}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""


def _licence(licence: Licence) -> str:
    limits = "It has the limits of the text and the teacher that it was made from."
    if licence.id is None:
        return (
            f"Unknown ({licence.source}). A student inherits its teacher's licence: find it out "
            f"before you pass this model on. {limits}"
        )
    return f"{licence.label}, inherited; read from {licence.source}. {limits}"


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}" if text else ""


def _list(lines: tuple[str, ...]) -> str:
    return "\n".join(f"- {_one_line(line)}" for line in lines)


def _one_line(text: str) -> str:
    """A name may hold line breaks: what follows them would be markup of the card's own."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _escaped(text: str) -> str:
    """A name as text, whatever markup it holds."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", _one_line(text))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown; without rows nothing."""
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = ([_one_line(cell).replace("|", "/") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
