"""Published models by their names: the short one, and the one on the Hugging Face Hub."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def families() -> dict[str, dict[str, Any]]:
    """What families.toml says, by the family's short name; every model with its `hub`."""
    data = tomllib.loads(Path(__file__).with_name("families.toml").read_text())
    for family in data.values():
        for model in family["models"]:
            names = {"name": model["name"], "lower": model["name"].lower()}
            model.setdefault("hub", family.get("hub", "").format(**names))
    return data


def hub_name(given: str) -> str:
    """The name on the Hub of a published model, as Qwen2.5-7B or qwen2.5-7b@main; a folder, or
    anything else, as it is."""
    name, mark, revision = given.strip().partition("@")
    hub = _by_short_name().get(name.lower())
    return given if hub is None or Path(given).exists() else f"{hub}{mark}{revision}"


@cache
def _by_short_name() -> dict[str, str]:
    return {
        model["name"].lower(): model["hub"]
        for family in families().values()
        for model in family["models"]
    }
