"""`capgap init`: five answers become a commented recipe, for which teacher or for one student."""

import sys
from pathlib import Path
from typing import Annotated, Any

from capgap.artifact import write_text
from capgap.cli.app import Answer
from capgap.errors import UserError
from capgap.sizes import LADDER_TOKENS, parse_count
from capgap.stage import ARGUMENT, FieldError, toml

HEAD = "# Written by `capgap init`; every key: docs/recipes.md\n"
# Window, and tokens of an optimizer step, from so many training tokens on
LOOPS = (
    (10**10, 2048, 1 << 21),
    (10**9, 2048, 1 << 19),
    (10**8, 2048, 1 << 17),
    (10**6, 512, 1 << 14),
    (0, 128, 1 << 11),
)


# What is asked for, and what stands where nothing is answered; empty: it is needed
QUESTIONS = {"text": "stdlib", "teachers": "", "students": "", "tokens": "", "gpus": "none"}


class Init(Answer):
    """Write a commented recipe from five answers, given as options or asked for."""

    out: Annotated[Path, ARGUMENT, "The file to write, such as mine.toml."]
    text: Annotated[str | None, "A file, folder, glob, or a dataset on the Hub."] = None
    teachers: Annotated[
        str | None, "One for a run, several for a sweep: names, Hub ids, folders."
    ] = None
    students: Annotated[str | None, "Sizes without embeddings, such as 300M,600M."] = None
    tokens: Annotated[
        str | None, "Tokens that a student learns from: 5B, or in a sweep 20x its size."
    ] = None
    gpus: Annotated[str | None, "Such as 8xA100; none for this machine."] = None

    def run(self, **_: Any) -> dict[str, Any]:
        """Writes the recipe, which is read once as the commands will; returns what comes next.

        UserError: a file that is there, answers that make no recipe.
        """
        from capgap.config import load_any_recipe

        if self.out.exists():
            raise UserError(f"{self.out} exists: choose another file, or delete it")
        answers = {name: self._answer(name, usual) for name, usual in QUESTIONS.items()}
        gpus = None if answers["gpus"] == "none" else answers["gpus"]
        teachers, students = (_parted(answers[name]) for name in ("teachers", "students"))
        for name, values in (("teachers", teachers), ("students", students)):
            if not values:
                raise FieldError(name, "are needed")
        tokens = answers["tokens"]
        is_run = len(teachers) == 1
        if is_run:
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

    def _answer(self, name: str, usual: str) -> str:
        given = getattr(self, name)
        texts = type(self).model_fields[name].metadata
        told = next(one for one in texts if isinstance(one, str)).rstrip(".")
        if given is None and sys.stdin.isatty():
            given = input(f"{name} ({told}){f' [{usual}]' if usual else ''}: ").strip()
        if not given and not usual:
            raise FieldError(name, f"is needed: {told}")
        return str(given or usual)


def run_recipe(
    name: str, teacher: str, student: str, tokens: str, text: str, gpus: str | None
) -> str:
    """One student out of one teacher, as TOML."""
    window, batch = _loop(parse_count(tokens))
    hardware = f'\n[hardware]\n# what `capgap plan` reckons with\ngpus = "{gpus}"\n' if gpus else ""
    return f"""{HEAD}name = "{name}"

[teacher]
# a published name, a name on the Hub, or a folder
model = {toml(teacher)}

[[corpus]]
# several of these make a mixture, by `weight`
source = {toml(text)}

[prune]
# of the student that is cut out; without embeddings, or with them as "360M total"
params = {toml(student)}

[distill]
tokens = {toml(tokens)}
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
    """Which of these teachers is best for each student, as TOML; sizes are a ladder to train.
    tokens: a count, of which a quarter is tried too, or as `20x` the student's size."""
    ladder = [parse_count(one) for one in teachers] if all(map(_is_size, teachers)) else []
    if tokens.endswith("x"):
        ratio = _ratio(tokens)
        least = ratio * min(map(parse_count, students))
        budgets = (
            f"# as many for each of a student's parameters\ntokens_per_parameter = [{ratio:g}]"
        )
    else:
        count = parse_count(tokens)
        least = count / 4
        budgets = "# a quarter too: do more tokens want a larger teacher?\n"
        budgets += f"tokens = [{count // 4}, {count}]"
    window, batch = _loop(round(least))
    models = f"# with one tokenizer; four or more tell a curve\nmodels = {toml(teachers)}"
    if ladder:
        models = f"# trained here, four or more for a curve\nsizes = {toml(teachers)}\n"
        models += f"tokens = {LADDER_TOKENS * max(ladder)}"
    return f"""{HEAD}name = "{name}"
# two seeds tell a difference from luck
seeds = [0, 1]
# students without a teacher, of the best teacher alone: what distilling gains
baselines = "best"
larger_teachers_only = true

[corpus]
source = {toml(text)}
window = {window}

[teachers]
{models}

[students]
# non-embedding parameters, cut out of every teacher
sizes = {toml(students)}
{budgets}

[training]
batch_tokens = {batch}
micro_batch_tokens = {min(batch, 4 * window)}
"""


def _is_size(text: str) -> bool:
    try:
        return parse_count(text) > 0
    except UserError:
        return False


def _ratio(tokens: str) -> float:
    try:
        return float(tokens.removesuffix("x"))
    except ValueError:
        raise FieldError("tokens", f"{tokens!r}: give 5B, or 20x a student's size") from None


def _loop(tokens: int) -> tuple[int, int]:
    """Window and tokens of an optimizer step for so many training tokens."""
    return next((window, batch) for least, window, batch in LOOPS if tokens >= least)


def _parted(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
