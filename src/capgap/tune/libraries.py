"""Whether TRL and PEFT are there; imports neither."""

from importlib.util import find_spec

from capgap.errors import UserError


def check_libraries() -> None:
    """UserError that names the extra where TRL, PEFT or accelerate is missing."""
    missing = [name for name in ("trl", "peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'capgap[chat]'")
