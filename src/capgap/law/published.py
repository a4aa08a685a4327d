"""What is published of the capacity gap, of small models' scores and of model families, and the
teachers that could be taken: published models, folders, sizes. Imports no torch before it must."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.corpus.names import HUB_NAME, looks_like_path
from capgap.errors import UserError
from capgap.hub import families
from capgap.law.surface import DistillationSurface, SupervisedSurface
from capgap.models.shape import Shape
from capgap.sizes import format_count, parse_count, parse_size


@dataclass(frozen=True)
class PublishedLine:
    """T* = slope S + intercept; the intercept in plain parameters."""

    name: str
    slope: float
    intercept: float

    def optimal_teacher(self, student_parameters: float) -> float:
        """Teacher size in parameters; may be negative far below the line's own range."""
        return self.slope * student_parameters + self.intercept


PUBLISHED_LINE = PublishedLine("Zhang et al., arXiv 2311.07052", 2.498, -11_498_000.0)

# T/S of the cells beside the best one, cut at 50% and 70%: what the line's grid can resolve
PUBLISHED_RESOLUTION = (2.0, 1 / 0.3)
# its teachers, in parameters
PUBLISHED_TEACHERS = (70e6, 2.8e9)

# Busbridge et al., arXiv 2502.08606: models of 143M to 12.6B parameters, about 1% error
PUBLISHED_SURFACE = DistillationSurface(
    SupervisedSurface(E=1.220, A=3355, B=18186, alpha=0.408, beta=0.431, gamma=0.452),
    A=2243,
    B=24181,
    alpha=0.321,
    beta=0.637,
    gamma=0.764,
    c0=2.549,
    c1=522.6,
    f1=0.090,
    d1=1.315,
)


@dataclass(frozen=True)
class BenchmarkResult:
    """A model on the six benchmarks of arXiv 2311.07052: scores in percent, `mean` the plain mean
    of them, `flops` the compute that it took. distilled: from a teacher; tuned: on instructions."""

    name: str
    flops: float
    mean: float
    scores: dict[str, float]
    distilled: bool = False
    tuned: bool = False


@cache
def published_results() -> tuple[BenchmarkResult, ...]:
    """The table of arXiv 2311.07052 (authors' repository), in its order."""
    data = _read("benchmarks.toml")
    return tuple(
        BenchmarkResult(
            name=model["name"],
            flops=1e21 * model["compute"],
            mean=fmean(model["scores"]),
            scores=dict(zip(data["benchmarks"], model["scores"], strict=True)),
            distilled=model.get("distilled", False),
            tuned=model.get("tuned", False),
        )
        for model in data["models"]
    )


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text())


_DIMENSIONS = ("hidden", "layers", "heads", "kv_heads", "head_size", "ffn")


@dataclass(frozen=True)
class Candidate:
    """A teacher that could be taken. Sizes in parameters; `tokens` it was trained on, or None.

    `source`: the folder, or the name on the Hub, with its weights; None where only sizes are known.
    family, year: of a published model. shape: None where only a size is known.
    """

    name: str
    non_embedding: int
    total: int
    tokens: int | None
    source: str | None = None
    family: str | None = None
    year: str | None = None
    shape: Shape | None = None

    def student_total(self, non_embedding: int) -> int:
        """All parameters of a student of this family and size: its width shrinks with the cube root
        of its size, as where layers and width shrink alike."""
        if self.shape is None:
            return non_embedding
        width = self.shape.hidden * (non_embedding / self.non_embedding) ** (1 / 3)
        tables = 1 if self.shape.tied else 2
        return round(non_embedding + width * self.shape.vocabulary * tables)


@dataclass(frozen=True, kw_only=True)
class PublishedModel(Candidate):
    """A member of a family. `tokens` of its pre-training; None where they are not published. year:
    month in which the family came out, as "2024-09". hub: its name on the Hugging Face Hub.
    can_cut: whether capgap can cut what is there."""

    shape: Shape
    hub: str
    can_cut: bool


@dataclass(frozen=True)
class PublishedFamily:
    """Models that share tokenizer and recipe, smallest first. tokenizer: a name that families with
    the same tokenizer share."""

    name: str
    title: str
    source: str
    tokenizer: str
    models: tuple[PublishedModel, ...]


@cache
def published_families() -> dict[str, PublishedFamily]:
    """Families by their short name: their models' dimensions, parameters and training tokens."""
    return {name: _family(name, fields) for name, fields in families().items()}


def _family(name: str, fields: dict[str, Any]) -> PublishedFamily:
    models = []
    for model in fields["models"]:
        shape = Shape(
            architecture=fields["architecture"],
            vocabulary=model.get("vocabulary", fields["vocabulary"]),
            positions=fields["positions"],
            tied=model.get("tied", fields.get("tied", False)),
            **dict(zip(_DIMENSIONS, model["shape"], strict=True)),
        )
        counts = shape.parameters()
        tokens = parse_count(model["tokens"]) if "tokens" in model else None
        known = (model["name"], counts.non_embedding, counts.total, tokens)
        more = {"family": name, "year": fields["year"], "hub": model["hub"]}
        can_cut = model.get("can_cut", True)
        models.append(PublishedModel(*known, shape=shape, can_cut=can_cut, **more))
    return PublishedFamily(
        name=name,
        title=fields["title"],
        source=fields["source"],
        tokenizer=fields.get("tokenizer", name),
        models=tuple(models),
    )


def find_family(name: str) -> PublishedFamily:
    """The family of that short name; UserError names those that are known."""
    families = published_families()
    family = families.get(name.lower().replace("-", "").replace("_", ""))
    if family is None:
        raise UserError(f"no family {name!r}: known are {', '.join(families)}")
    return family


def find_model(name: str) -> PublishedModel | None:
    """The published model of that name, or of that name on the Hub, as Qwen/Qwen2.5-7B or with
    @revision; None where there is none."""
    return _by_name().get(name.strip().lower().partition("@")[0])


@cache
def _by_name() -> dict[str, PublishedModel]:
    models = [model for family in published_families().values() for model in family.models]
    return {name.lower(): model for model in models for name in (model.name, model.hub)}


def candidates_of(family: str | None, teachers: Sequence[str]) -> list[Candidate]:
    """The members of a family, and teachers by their published name, a Hugging Face folder or name
    on the Hub such as Qwen/Qwen2.5-7B (whose config is read), NAME=FOLDER, or a size such as 7B.

    A published name with a folder has the published sizes and tokens, and the folder's weights; any
    other name is what the folder is called here. UserError for names that are none, and where
    nothing is asked for.
    """
    found: list[Candidate] = [] if family is None else [*find_family(family).models]
    found += [_candidate(name.strip()) for name in teachers]
    if not found:
        raise UserError(
            "no teachers to choose from: give `family` (" + ", ".join(published_families()) + ") "
            "or `teachers`, such as Llama-2-7B,Qwen2.5-14B or 3B,7B"
        )
    names = [one.name for one in found]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise UserError(
            f"the teacher {twins[0]} is given twice: tell folders of one name apart as NAME=FOLDER"
        )
    return found


def sources_of(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Where the weights of each candidate are, by its name; UserError for one without weights."""
    found = {}
    for one in candidates:
        if one.source is None:
            raise UserError(
                f"`measure` reads models, and of {one.name} there are no weights: give a folder or "
                f"a name on the Hub in `teachers`, as {one.name}=FOLDER, or leave `measure` away"
            )
        found[one.name] = one.source
    return found


def _candidate(given: str) -> Candidate:
    name, mark, place = (part.strip() for part in given.partition("="))
    known = find_model(name)
    if not mark:
        place = name if Path(name).is_dir() else ""
    if known is not None:
        if place:
            _check_published(known, place)
        return replace(known, source=place or None)
    if mark:
        if not (name and place):
            raise UserError(f"`teachers`: {given!r} is not of the form NAME=FOLDER")
        return _by_config(place, name)
    is_hub_name = "/" in name and HUB_NAME.fullmatch(name) and not looks_like_path(name)
    if place or is_hub_name:
        return _by_config(name, Path(name).resolve().name)
    try:
        size, _ = parse_size(name)
    except UserError:
        raise UserError(
            f"`teachers`: {name!r} is no published model (such as Llama-2-7B, Llama-2-13B), no "
            "folder, no name on the Hub (such as Qwen/Qwen2.5-7B) and no size (such as 7B)"
        ) from None
    return Candidate(name, size, size, None)


def _check_published(model: PublishedModel, source: str) -> None:
    """UserError where what lies at `source` has another size."""
    from capgap.models.families import FAMILIES
    from capgap.models.stored import read_config

    if read_config(source).model_type not in FAMILIES:
        return
    size = _by_config(source, model.name).non_embedding
    if abs(size / model.non_embedding - 1) > 0.01:
        raise UserError(
            f"the model in {source} has {format_count(size)} non-embedding parameters, "
            f"{model.name} {format_count(model.non_embedding)}: name it otherwise, as NAME=FOLDER"
        )


def _by_config(source: str, name: str) -> Candidate:
    # the only teachers for which transformers, and with it torch, is loaded
    from capgap.models.build import shape_of
    from capgap.models.families import FAMILIES
    from capgap.models.identity import count_parameters
    from capgap.models.stored import empty_model, read_config

    config = read_config(source)
    if config.model_type in FAMILIES:
        shape = shape_of(config)
        counts = shape.parameters()
        return Candidate(name, counts.non_embedding, counts.total, None, source, shape=shape)
    non_embedding, total = count_parameters(empty_model(config))
    return Candidate(name, non_embedding, total, None, source)
