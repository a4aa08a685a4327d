"""Names on the Hugging Face hub: told from paths, and looked up once without retries."""

import re
from pathlib import Path
from typing import Literal

from capgap.errors import UserError

HUB_SECONDS = 10.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of a checkpoint that brings code
OWN_CODE = (
    "such code is run by `capgap evaluate` and `capgap chat` alone, with --trust-remote-code, once "
    "you have read it"
)


def looks_like_path(text: str, *, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether the text names a place on this machine rather than a name on the hub."""
    return (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or text.endswith("/")
        or text.lower().endswith(suffixes)
        or Path(text).exists()
    )


def is_cached(name: str, file: str) -> bool:
    """Whether this file of a model on the hub lies in the hub's cache here."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_NAME.fullmatch(name):
        return False
    return isinstance(try_to_load_from_cache(name, file), str)


def hub_revision(name: str, *, kind: Literal["dataset", "model"]) -> str:
    """The commit a hub name stands for now: one request, so that a missing network is told at once.

    Raises:
        UserError: no network, no such name, or no access.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        return str(ask(name, timeout=HUB_SECONDS).sha)
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
