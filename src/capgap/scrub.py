"""Secrets stay out of records: whatever looks like one becomes `***` before it is written.

Three kinds are known: passwords and tokens within addresses, tokens of a known form, and the values
of this process's environment variables that are named like secrets.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# https://user:password@host, with or without a user; a password may have an @ of its own
_LOGIN = re.compile(r"(?<=://)[^/\s\"']+(?=@)")
# ?token=..., &X-Amz-Signature=...
_QUERY = re.compile(
    r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|password|signature|credential|api_?key)|sig|key)=)"
    r"[^&#\s\"']+"
)
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}"
    r"|\bsk-[\w-]{20,}"  # OpenAI and those who copied its form
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=\bBearer )[\w.~+/-]{16,}=*"
)
_SECRET_NAME = re.compile(
    r"(?i)(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key|private_?key)$"
)
# Shorter values are words that texts have for other reasons
_SHORTEST_VALUE = 12


def is_secret_name(name: str) -> bool:
    """Whether a variable or a key of this name holds a secret: HF_TOKEN, api_key."""
    return _SECRET_NAME.search(name) is not None


def scrub_text(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without its secrets; `environment` None is that of this process."""
    variables = os.environ if environment is None else environment
    secrets = {value for name, value in variables.items() if is_secret_name(name)}
    # the longest first, since one may be a part of another
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= _SHORTEST_VALUE:
            text = text.replace(value, HIDDEN)
    text = _LOGIN.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def scrub(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A record without secrets (docs/security.md#secrets) in the strings of its dicts, lists and
    tuples; a value whose key names a secret goes whole. All else stays as it is."""
    if isinstance(value, str):
        return scrub_text(value, environment)
    if isinstance(value, list | tuple):
        return type(value)(scrub(one, environment) for one in value)
    if not isinstance(value, dict):
        return value
    return {
        key: HIDDEN
        if isinstance(key, str) and isinstance(one, str) and one and is_secret_name(key)
        else scrub(one, environment)
        for key, one in value.items()
    }
