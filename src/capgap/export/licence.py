"""The licence that a student inherits from its teacher: found and said, never made up."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.corpus.hub import HUB_SECONDS, is_cached
from capgap.models.stored import LICENCES

CARD = "README.md"
# What the beginning of a licence's text says, and its id on the Hugging Face Hub
_TEXTS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"\bMIT License\b|Permission is hereby granted, free of charge, to any person", "mit"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"Gemma Terms of Use", "gemma"),
    (r"Attribution-ShareAlike 4\.0 International", "cc-by-sa-4.0"),
    (r"Attribution 4\.0 International", "cc-by-4.0"),
)


@dataclass(frozen=True)
class Licence:
    """`id` as the Hub names it, None where it is unknown; `source` says where it was read, or why
    it is not known. `name` and `link` belong to licences that the Hub has no id for."""

    id: str | None
    source: str
    name: str | None = None
    link: str | None = None


def find_licence(places: Iterable[tuple[str, str]]) -> Licence:
    """The first licence among (what it is, folder or name on the Hub), such as ("the teacher",
    "EleutherAI/pythia-410m"); Licence(None, why) where none tells one."""
    looked = []
    for what, place in places:
        if Path(place).is_dir():
            found = _in_folder(what, Path(place))
        elif is_on_hub(place):
            found = _on_hub(what, place)
        else:
            looked.append(f"{what} {Path(place).name!r} is not there any more")
            continue
        if found.id is not None:
            return found
        looked.append(found.source)
    return Licence(None, "; ".join(looked) or "no teacher is known")


def is_on_hub(place: str) -> bool:
    """Whether it was loaded from the Hub here: the name of a folder that is gone may look like one
    of the Hub's, and be that of a stranger's model there."""
    return not Path(place).exists() and is_cached(place, "config.json")


def _in_folder(what: str, folder: Path) -> Licence:
    card = folder / CARD
    if card.is_file():
        found = _from_card(front_matter(card), f"the model card of {what} {folder.name!r}")
        if found is not None:
            return found
    for path in sorted(path for pattern in LICENCES[:1] for path in folder.glob(pattern)):
        source = f"{path.name} of {what} {folder.name!r}"
        beginning = path.read_text(errors="replace")[:3000]
        for pattern, name in _TEXTS:
            if re.search(pattern, beginning, re.IGNORECASE):
                return Licence(name, source)
        return Licence("other", source, name=_title(beginning), link=path.name)
    return Licence(None, f"{what} {folder.name!r} tells none")


def _on_hub(what: str, name: str) -> Licence:
    """From the card in the cache, or by one request."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    source = f"the model card of {what} {name!r}"
    if is_cached(name, CARD):
        fields = front_matter(Path(str(try_to_load_from_cache(name, CARD))))
    else:
        try:
            card = HfApi().model_info(name, timeout=HUB_SECONDS).card_data
        # The client raises errors of whatever HTTP library it is built on: the licence is then
        # unknown, and that is said
        except Exception:
            return Licence(None, f"{source} could not be read: no network, or no access")
        fields = {} if card is None else card.to_dict()
    return _from_card(fields, source) or Licence(None, f"{source} tells none")


def _from_card(fields: dict[str, Any], source: str) -> Licence | None:
    told = fields.get("license")
    if isinstance(told, list):
        told = told[0] if len(told) == 1 else None
    if not isinstance(told, str) or told in ("", "unknown"):
        return None
    return Licence(told, source, name=fields.get("license_name"), link=fields.get("license_link"))


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; {} where there is none or it cannot be read."""
    import yaml

    # a byte that is no UTF-8 in its text says nothing of its head
    text = card.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        found = yaml.safe_load(head[1]) if head is not None else None
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _title(text: str) -> str:
    """The first line of a licence, as the short name that the Hub wants."""
    line = next((line for line in text.splitlines() if line.strip()), "licence")
    return re.sub(r"[^a-z0-9.]+", "-", line.lower()).strip("-")[:60]
