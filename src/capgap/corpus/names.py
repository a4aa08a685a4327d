"""What users name: prepared corpora by folder and weight; models and datasets on the Hugging Face
hub. Light: neither numpy nor the hub's client is imported before it is needed."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from capgap.errors import UserError
from capgap.mirror import local

MANIFEST = "manifest.json"
HUB_SECONDS = 10.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
# Of a checkpoint that brings code
OWN_CODE = (
    "such code is run by `capgap evaluate` and `capgap chat` alone, with --trust-remote-code, once "
    "you have read it"
)


class Weighted(NamedTuple):
    """A prepared corpus by its folder, and its weight among others; None: all weigh the same."""

    folder: Path
    weight: float | None = None

    def __str__(self) -> str:
        """As it is typed."""
        return str(self.folder) + ("" if self.weight is None else f"={self.weight!r}")


def chunks_beside(folder: Path) -> Path:
    """Where what was found in the files of a corpus lies until it is whole."""
    return folder.with_name(f".{folder.name}.chunks")


def parse_mixture(texts: Sequence[str]) -> tuple[Weighted, ...]:
    """Read FOLDER=WEIGHT, once or several times; UserError as `check_weights`."""
    parsed = []
    for text in texts:
        folder, equals, weight = text.rpartition("=")
        # a folder's name may hold the sign
        if not equals or Path(text).exists():
            parsed.append(Weighted(Path(local(text))))
            continue
        try:
            number = float(weight) if folder else math.nan
        except ValueError:
            number = math.nan
        _check_weight(number, repr(text), weight)
        parsed.append(Weighted(Path(local(folder)), number))
    return check_weights(parsed)


def check_weights(corpora: Sequence[Weighted]) -> tuple[Weighted, ...]:
    """UserError: a weight that is no number above 0, some with a weight and some without, one
    corpus twice."""
    folders = [folder for folder, _ in corpora]
    without = [folder for folder, weight in corpora if weight is None]
    if without and len(without) < len(corpora):
        raise UserError(f"{without[0]} has no weight: give every corpus one, or none")
    for folder, weight in corpora:
        if weight is not None:
            _check_weight(weight, folder, weight)
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice: give it once, with its whole weight")
    return tuple(corpora)


def _check_weight(number: float, where: object, written: object) -> None:
    if not 0 < number < math.inf:
        raise UserError(f"{where}: the weight {written!r} is no number above 0")


def _parsed(given: Any) -> Any:
    """One text or folder, or several, as pairs; anything else as it is."""
    corpora = [given] if isinstance(given, str | Path) else given
    if not isinstance(corpora, list | tuple):
        return given
    try:
        if corpora and all(isinstance(one, tuple) for one in corpora):
            return check_weights([Weighted(Path(folder), weight) for folder, weight in corpora])
        if all(isinstance(one, str | Path) for one in corpora):
            return parse_mixture([str(one) for one in corpora]) or None
        return given
    except UserError as error:
        raise ValueError(str(error)) from None


# The type of a stage's field: one prepared corpus, or several by weight
Given = Annotated[
    tuple[Weighted, ...],
    BeforeValidator(_parsed),
    PlainSerializer(lambda given: None if given is None else [str(one) for one in given]),
]


def looks_like_path(text: str, *, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether the text names a place on this machine rather than a name on the hub."""
    return (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or text.endswith("/")
        or text.lower().endswith(suffixes)
        or Path(text).exists()
    )


def at_revision(name: str) -> tuple[str, str | None]:
    """A model of the hub without its @revision, and that: a branch, a tag or a commit."""
    repository, _, revision = name.partition("@")
    return (repository, revision or None) if HUB_NAME.fullmatch(name) else (name, None)


def cached_file(name: str, file: str) -> Path | None:
    """Where this file of a model on the hub lies in the cache here; None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_NAME.fullmatch(name):
        return None
    repository, revision = at_revision(name)
    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def check_model_name(name: str) -> None:
    """UserError where no folder and no model on the Hub is called so; loads nothing heavy."""
    if Path(local(name, light=True)).is_dir():
        return
    if looks_like_path(name) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name} is no model folder")
    # without a network a loader would retry for most of a minute
    if cached_file(name, "config.json") is None:
        hub_revision(name, kind="model")


def check_prepared(folder: Path) -> None:
    """UserError where no corpus was prepared."""
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} holds no prepared corpus: make one with `capgap corpus SOURCE --out "
            f"{folder} --tokenizer TEACHER`"
        )


def hub_revision(name: str, *, kind: Literal["dataset", "model"]) -> str:
    """The commit a hub name stands for now: one request, so that a missing network is told at once.
    UserError: no network, no such name, or no access."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = at_revision(name)
    try:
        found = HfApi().repo_info(
            repository, revision=revision, repo_type=kind, timeout=HUB_SECONDS
        )
        return str(found.sha)
    except RevisionNotFoundError as error:
        raise UserError(f"the {kind} {repository!r} has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise UserError(
            f"the {kind} {name!r} on the Hugging Face hub asks for access: accept its terms on its "
            "page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no file, folder or Hugging Face {kind} is called {name!r}: check the name, or write "
            f"./{name} for a path"
        ) from error
    # The hub's client raises errors of whatever HTTP library its version is built on, so they
    # cannot be named here; nothing is hidden, the cause goes into the message.
    except Exception as error:
        raise UserError(
            f"cannot reach the Hugging Face hub for the {kind} {name!r} ({error}): there is no "
            "file or folder of that name, and a name on the hub needs a network"
        ) from error
