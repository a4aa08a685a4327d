"""`capgap init`: five answers become a commented recipe, for which teacher or for one student."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from capgap.artifact import write_text
from capgap.cli.app import Answer
from capgap.errors import UserError
from capgap.sizes import parse_count, parse_size
from capgap.stage import ARGUMENT, FieldError

HEAD = "# Written by `capgap init`; every key: docs/recipes.md\n"
# Tokens of an optimizer step, from so many training tokens on
BATCHES = ((10**10, 1 << 21), (10**9, 1 << 19), (10**8, 1 << 17), (0, 1 << 14))
WINDOW, SHORT_WINDOW = 2048, 512


class _Question(NamedTuple):
    text: str
    default: str


QUESTIONS = {
    "text": _Question("Text: a file, folder, glob, or a dataset on the Hub", "stdlib"),
    "teachers": _Question("Teachers, parted by commas (one: a run; several: which is best?)", ""),
    "students": _Question("Sizes of students without embeddings, such as 300M,600M", ""),
    "tokens": _Question("Tokens that a student learns from, such as 5B", ""),
    "gpus": _Question("GPUs, such as 8xA100; none for this machine", "none"),
}


class Init(Answer):
    """Write a commented recipe from five answers, given as options or asked for."""

    out: Annotated[Path, ARGUMENT, "The file to write, such as mine.toml."]
    text: Annotated[str | None, "Text: a file, folder, glob, or a dataset on the Hub."] = None
    teachers: Annotated[
        str | None, "One for a run, several for a sweep: names, Hub ids, folders."
    ] = None
    students: Annotated[str | None, "Sizes without embeddings, such as 300M,600M."] = None
    tokens: Annotated[str | None, "Tokens that a student learns from, such as 5B."] = None
    gpus: Annotated[str | None, "Such as 8xA100; none for this machine."] = None

    def run(self, **_: Any) -> dict[str, Any]:
        """Writes the recipe, which is read once as the commands will; returns what comes next.

        UserError: a file that is there, answers that make no recipe.
        """
        from capgap.config import load_any_recipe

        if self.out.exists():
            raise UserError(f"{self.out} exists: choose another file, or delete it")
        answers = {name: self._answer(name, question) for name, question in QUESTIONS.items()}
        gpus = None if answers["gpus"] == "none" else answers["gpus"]
        teachers, students = (_parted(answers[name]) for name in ("teachers", "students"))
        for name, values in (("teachers", teachers), ("students", students)):
            if not values:
                raise FieldError(name, "are needed")
        tokens = answers["tokens"]
        if len(teachers) == 1:
            written = run_recipe(
                self.out.stem, teachers[0], students[0], tokens, answers["text"], gpus
            )
        else:
            written = sweep_recipe(self.out.stem, teachers, students, tokens, answers["text"])
        write_text(self.out, written)
        try:
            load_any_recipe(self.out)
        except UserError:
            self.out.unlink()
            raise
        return {"recipe": str(self.out)}

    def told(self, found: dict[str, Any]) -> str:
        return f"written: {found['recipe']}"

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        return ("plan", self.out)

    def _answer(self, name: str, question: _Question) -> str:
        given = getattr(self, name)
        if given is None and sys.stdin.isatty():
            default = f" [{question.default}]" if question.default else ""
            given = input(f"{question.text}{default}: ").strip()
        if not given and not question.default:
            raise FieldError(name, f"is needed. {question.text}")
        return str(given or question.default)


def run_recipe(
    name: str, teacher: str, student: str, tokens: str, text: str, gpus: str | None
) -> str:
    """One student out of one teacher, as TOML."""
    size, is_total = parse_size(student)
    window, batch = _batch(parse_count(tokens))
    hardware = f'\n[hardware]\n# what `capgap plan` reckons with\ngpus = "{gpus}"\n' if gpus else ""
    return f"""{HEAD}name = "{name}"

[teacher]
# a published name, a name on the Hub, or a folder
model = {_text(teacher)}

[[corpus]]
# several of these make a mixture, by `weight`
source = {_text(text)}

[prune]
# {"all" if is_total else "non-embedding"} parameters of the student that is cut out
{"total_params" if is_total else "params"} = {size}

[distill]
tokens = {_text(tokens)}
window = {window}

[training]
batch_tokens = {batch}
# what goes through the models at once: less takes less memory, and changes no result
micro_batch_tokens = {min(batch, 4 * window)}

[evaluate]
tasks = ["heldout"]

[export]
{hardware}"""


def sweep_recipe(
    name: str, teachers: list[str], students: list[str], tokens: str, text: str
) -> str:
    """Which of these teachers is best for each student, as TOML."""
    count = parse_count(tokens)
    window, batch = _batch(count // 4)
    return f"""{HEAD}name = "{name}"
# two seeds tell a difference from luck
seeds = [0, 1]
# students without a teacher, of the best teacher alone: what distilling gains
baselines = "best"

[corpus]
source = {_text(text)}
window = {window}

[teachers]
# with one tokenizer; four or more tell a curve
models = [{", ".join(map(_text, teachers))}]

[students]
# non-embedding parameters, cut out of every teacher
sizes = [{", ".join(map(_text, students))}]
# a quarter too: do more tokens want a larger teacher?
tokens = [{count // 4}, {count}]

[training]
batch_tokens = {batch}
micro_batch_tokens = {min(batch, 4 * window)}
"""


def _batch(tokens: int) -> tuple[int, int]:
    """Window and tokens of an optimizer step for so many training tokens."""
    batch = next(size for least, size in BATCHES if tokens >= least)
    return (WINDOW if batch >= 1 << 17 else SHORT_WINDOW), batch


def _parted(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _text(value: str) -> str:
    """As TOML writes it."""
    return json.dumps(value, ensure_ascii=False)
