"""The teachers that could be taken, by name, folder or size. Imports no torch before it must."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capgap.corpus.hub import HUB_NAME, looks_like_path
from capgap.errors import UserError
from capgap.law.families import PublishedModel, find_family, find_model, published_families
from capgap.sizes import format_count, parse_size


@dataclass(frozen=True)
class Candidate:
    """A teacher that could be taken. Sizes in parameters; `tokens` it was trained on, or None.

    `source`: the folder, or the name on the Hub, with its weights; None where only sizes are known.
    family, year: of a published model. width, vocabulary: of its embeddings; tables: 1 where the
    head is tied to them, else 2; None where only a size is known.
    """

    name: str
    non_embedding: int
    total: int
    tokens: int | None
    source: str | None = None
    family: str | None = None
    year: str | None = None
    embedding: tuple[int, int, int] | None = None

    def student_total(self, non_embedding: int) -> int:
        """All parameters of a student of this family and size: its width shrinks with the cube root
        of its size, as where layers and width shrink alike."""
        if self.embedding is None:
            return non_embedding
        width, vocabulary, tables = self.embedding
        share = (non_embedding / self.non_embedding) ** (1 / 3)
        return round(non_embedding + width * share * vocabulary * tables)


def candidates_of(family: str | None, teachers: Sequence[str]) -> list[Candidate]:
    """The members of a family, and teachers by their published name, a Hugging Face folder or name
    on the Hub such as Qwen/Qwen2.5-7B (whose config is read), NAME=FOLDER, or a size such as 7B.

    A published name with a folder has the published sizes and tokens, and the folder's weights; any
    other name is what the folder is called here. UserError for names that are none, and where
    nothing is asked for.
    """
    models = list(find_family(family).models) if family is not None else []
    found = [published(model) for model in models]
    found += [_candidate(name.strip()) for name in teachers]
    if not found:
        raise UserError(
            "no teachers to choose from: give --family (" + ", ".join(published_families()) + ") "
            "or --teachers, such as Llama-2-7B,Qwen2.5-14B or 3B,7B"
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
                f"--measure reads models, and of {one.name} there are no weights: give a folder or "
                f"a name on the Hub in --teachers, as {one.name}=FOLDER, or leave --measure away"
            )
        found[one.name] = one.source
    return found


def published(model: PublishedModel, source: str | None = None) -> Candidate:
    """A published model; UserError where what lies at `source` has another size."""
    counts, shape = model.parameters(), model.shape
    if source is not None:
        _check_published(model, source)
    return Candidate(
        name=model.name,
        non_embedding=counts.non_embedding,
        total=counts.total,
        tokens=model.tokens,
        source=source,
        family=model.family,
        year=model.year,
        embedding=(shape.hidden, shape.vocabulary, 1 if shape.tied else 2),
    )


def _candidate(given: str) -> Candidate:
    name, mark, place = (part.strip() for part in given.partition("="))
    known = find_model(name)
    if not mark:
        place = name if Path(name).is_dir() else ""
    if known is not None:
        return published(known, place or None)
    if mark:
        if not (name and place):
            raise UserError(f"--teachers: {given!r} is not of the form NAME=FOLDER")
        return _by_config(place, name)
    is_hub_name = "/" in name and HUB_NAME.fullmatch(name) and not looks_like_path(name)
    if place or is_hub_name:
        return _by_config(name, Path(name).resolve().name)
    return _by_size(name)


def _check_published(model: PublishedModel, source: str) -> None:
    from capgap.models.families import FAMILIES
    from capgap.models.stored import read_config

    if read_config(source).model_type not in FAMILIES:
        return
    size, expected = _by_config(source, model.name).non_embedding, model.parameters().non_embedding
    if abs(size / expected - 1) > 0.01:
        raise UserError(
            f"the model in {source} has {format_count(size)} non-embedding parameters, "
            f"{model.name} {format_count(expected)}: name it otherwise, as NAME=FOLDER"
        )


def _by_config(source: str, name: str) -> Candidate:
    # the only teachers for which transformers, and with it torch, is loaded
    from capgap.models.build import shape_of
    from capgap.models.families import FAMILIES
    from capgap.models.stored import empty_model, read_config

    config = read_config(source)
    if config.model_type in FAMILIES:
        shape = shape_of(config)
        counts = shape.parameters()
        tables = (shape.hidden, shape.vocabulary, 1 if shape.tied else 2)
        return Candidate(name, counts.non_embedding, counts.total, None, source, embedding=tables)
    model = empty_model(config)
    total = sum(weight.numel() for weight in model.parameters())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding = sum({id(one.weight): one.weight.numel() for one in ends if one}.values())
    return Candidate(name, total - embedding, total, None, source)


def _by_size(name: str) -> Candidate:
    try:
        size, _ = parse_size(name)
    except UserError:
        known = ", ".join(find_family("llama2").models[i].name for i in range(2))
        raise UserError(
            f"--teachers: {name!r} is no published model (such as {known}), no folder, no name on "
            "the Hub (such as Qwen/Qwen2.5-7B) and no size (such as 7B)"
        ) from None
    return Candidate(name, size, size, None)
