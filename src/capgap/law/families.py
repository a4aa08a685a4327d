"""Published model families: their members, parameters by part, and the tokens they read."""

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from capgap.errors import UserError
from capgap.models.shape import Shape
from capgap.sizes import ParameterCounts, parse_count


@dataclass(frozen=True)
class PublishedModel:
    """A member of a family. `tokens` of its pre-training; None where they are not published. year:
    month in which the family came out, as "2024-09". tokenizer: a name that families with the
    same one share."""

    name: str
    family: str
    shape: Shape
    tokens: int | None
    year: str
    tokenizer: str
    head_norms: bool = False

    def parameters(self) -> ParameterCounts:
        """By part, from the published dimensions."""
        counts = self.shape.parameters()
        if not self.head_norms:
            return counts
        # one norm on queries and one on keys, each of a head's width
        return replace(counts, norms=counts.norms + self.shape.layers * 2 * self.shape.head_size)


@dataclass(frozen=True)
class PublishedFamily:
    """Models that share tokenizer and recipe, smallest first."""

    name: str
    title: str
    source: str
    models: tuple[PublishedModel, ...]


@cache
def published_families() -> dict[str, PublishedFamily]:
    """All of them, by their short name."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {name: _family(name, fields) for name, fields in data.items()}


def find_family(name: str) -> PublishedFamily:
    """The family of that short name; UserError tells which there are."""
    families = published_families()
    found = families.get(name.lower().replace("-", "").replace("_", ""))
    if found is None:
        raise UserError(f"no family {name!r}: known are {', '.join(families)}")
    return found


def find_model(name: str) -> PublishedModel | None:
    """The published model of that name, None where there is none."""
    for family in published_families().values():
        for model in family.models:
            if model.name.lower() == name.strip().lower():
                return model
    return None


def _family(name: str, fields: dict[str, Any]) -> PublishedFamily:
    models = []
    for model in fields["models"]:
        hidden, layers, heads, kv_heads, head_size, ffn = model["shape"]
        shape = Shape(
            architecture=fields["architecture"],
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            ffn=ffn,
            vocabulary=model.get("vocabulary", fields["vocabulary"]),
            positions=fields["positions"],
            tied=model.get("tied", fields.get("tied", False)),
        )
        tokens = None if "tokens" not in model else parse_count(model["tokens"])
        models.append(
            PublishedModel(
                model["name"],
                name,
                shape,
                tokens,
                fields["year"],
                fields.get("tokenizer", name),
                fields.get("head_norms", False),
            )
        )
    return PublishedFamily(name, fields["title"], fields["source"], tuple(models))
