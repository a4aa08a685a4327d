"""Writes the tables of options of stages into docs/cli.md, from the stages themselves.

    python docs/generate.py

A test holds the page to what this writes.
"""

import re
from pathlib import Path

from typer.models import ArgumentInfo

import capgap
from capgap.stage import Stage, command_line

DOCS = Path(__file__).parent
SHARED = (
    "| `--quiet`, `-q` | | no progress |",
    "| `--json` | | one JSON object on standard output |",
)


def stages() -> list[type[Stage]]:
    return [getattr(capgap, name) for name in capgap.STAGES]


def table(kind: type[Stage]) -> list[str]:
    """The options of a stage's command, one a row."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for parameter in command_line(kind):
        asked = parameter.annotation.__metadata__[0]
        if isinstance(asked, ArgumentInfo):
            continue
        # typer takes the first name for a default until it reads the command
        names = ", ".join(f"`{name}`" for name in (asked.default, *asked.param_decls))
        default = "required" if parameter.default is parameter.empty else ""
        if parameter.default and isinstance(parameter.default, str):
            default = f"`{parameter.default}`"
        cells = (names, default, asked.help.rstrip("."))
        lines.append("|" + "|".join(f" {one} ".replace("|", "\\|") for one in cells) + "|")
    return [*lines, *SHARED]


def cli_page(text: str) -> str:
    """The page with the tables of all stages as they are now."""
    for kind in stages():
        head, heading, rest = text.partition(f"\n## `capgap {kind.title()}`\n")
        own = re.search(r"^\| option \|.*\n(?:\|.*\n)+", rest, re.MULTILINE)
        assert own is not None
        rest = rest[: own.start()] + "\n".join(table(kind)) + "\n" + rest[own.end() :]
        text = head + heading + rest
    return text


if __name__ == "__main__":
    page = DOCS / "cli.md"
    page.write_text(cli_page(page.read_text()))
