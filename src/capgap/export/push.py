"""A written model goes to the Hugging Face Hub, private unless asked otherwise; first it is told
what the licence asks of those who pass a derived model on.

The terms are summaries of the licences' own texts, which count.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capgap.corpus.names import HUB_NAME
from capgap.errors import UserError, border
from capgap.sizes import format_bytes
from capgap.stage import FieldError, Say

_COPY = "give a copy of the licence along"
_CHANGED = "say that the model was changed"
_META = (
    "give a copy of the agreement and its notice (in a file NOTICE) along",
    "pass its acceptable use policy on",
)
_LLAMA = (*_META, "show 'Built with Llama'", "begin the model's name with Llama")
TERMS = {
    "apache-2.0": (_COPY, _CHANGED, "keep its NOTICE, where there is one"),
    "mit": ("keep the copyright line and the licence",),
    "llama2": (*_META, "improve no other language model with it than those of Llama 2"),
    "llama3": (*_META, "show 'Built with Meta Llama 3'", "begin the model's name with Llama 3"),
    "llama3.1": _LLAMA,
    "llama3.2": _LLAMA,
    "llama3.3": _LLAMA,
    "gemma": ("give a copy of the terms along", "pass its restrictions of use on", _CHANGED),
    "cc-by-4.0": ("name the authors, link the licence", _CHANGED),
    "cc-by-sa-4.0": ("name the authors, link the licence", _CHANGED, "keep this licence"),
}


def check_push(name: str, *, upload: bool) -> None:
    """UserError for no name on the Hub, and where an `upload` would need a login that is not
    there."""
    if "/" not in name or not HUB_NAME.fullmatch(name) or "@" in name:
        raise FieldError("push", f"{name!r} is no name on the Hub: give OWNER/NAME")
    if not upload:
        return
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "the Hub asks who uploads: log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write"
        )


def push(
    name: str, files: Sequence[Path], licence: str | None, *, public: bool, upload: bool, say: Say
) -> dict[str, Any]:
    """Uploads a model folder and single files beside it; returns what was told.

    UserError: a public model of unknown licence, or whose licence asks for another name; what the
    Hub refuses.
    """
    terms = TERMS.get(licence or "", ())
    parts = [one for path in files for one in (path, *path.rglob("*")) if one.is_file()]
    size = sum(one.stat().st_size for one in parts)
    say(f"licence {licence or 'unknown'}: {'; '.join(terms) or 'read it before you pass it on'}")
    if public:
        _check_public(name, licence)
    kind = "public" if public else "private"
    say(f"{format_bytes(size)} to the Hub as {name}, {kind}" + ("" if upload else ": not uploaded"))
    url = None
    if upload:
        with border(f"cannot upload to {name}; it is written, and `hf upload` goes on from there"):
            url = _upload(name, files, public=public)
    told = {"name": name, "public": public, "bytes": size, "terms": list(terms)}
    return told | {"uploaded": upload, "url": url}


def _check_public(name: str, licence: str | None) -> None:
    if licence is None:
        raise UserError(f"{name}: no public model of unknown licence: leave `public` away")
    is_named = name.partition("/")[2].lower().startswith("llama")
    if licence.startswith("llama3") and not is_named:
        raise UserError(f"{name}: the licence {licence} asks that the name begin with Llama")


def _upload(name: str, files: Sequence[Path], *, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    url = str(api.create_repo(name, private=not public, exist_ok=True))
    for path in files:
        if path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path)
        else:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
    return url
