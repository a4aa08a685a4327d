"""The model card: README.md with the front matter that the Hugging Face Hub reads.

One text for every model that capgap hands on, card.md.j2; `facts.py` and `from_sweep.py` fill it.
"""

import json
import re
from dataclasses import dataclass
from importlib import resources

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
    """The whole README.md. Text from outside is no markup in it."""
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
        "score": _score,
        "measured": _measured,
    }
    template = resources.files(__package__).joinpath("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(card=card, front_matter=_front_matter(card))


def objective(alpha: float, divergence: str, temperature: float) -> str:
    """The line of how a student learnt from its teacher."""
    return (
        f"loss: {1 - alpha:g} cross-entropy + {alpha:g} {divergence} to the teacher at temperature "
        f"{temperature:g}"
    )


def _front_matter(card: Card) -> str:
    """YAML, with the benchmarks as the Hub's `model-index`, where they are of this very model."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.name,
            dataset_name=one.name,
            dataset_args=None if one.shots is None else {"num_few_shot": one.shots},
            metric_type=one.metric or "score",
            metric_value=one.score,
        )
        for one in card.benchmarks
        if one.score is not None and not card.benchmarks_before
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=card.licence.id,
        license_name=card.licence.name,
        license_link=card.licence.link,
        base_model=card.base_model,
        tags=["distillation", "capgap"],
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


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


def _one_line(text: str) -> str:
    """A name may hold line breaks: what follows them would be markup of the card's own."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
