"""The evaluation sets by name: what the harness calls them, shots, and which number counts.

Imports no torch and no harness.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from capgap.errors import UserError

# Its loss is measured here, not by the harness
HELDOUT = "heldout"
CODE = "humaneval"


@dataclass(frozen=True)
class BenchmarkSet:
    """An evaluation set.

    `title` as people write it; `hub` its dataset on the Hub; `metric` the score that counts, as the
    harness calls it. `folder` under the harness' tasks, and `task` its only task there or, with
    `has_parts`, the beginning of every part's. `shots` by default, `most_shots` that there are
    (None: as many as fit). `by_question`: the score is the mean over all questions, not over
    the parts.
    """

    name: str
    title: str
    hub: str
    folder: str
    task: str
    metric: str
    shots: int = 0
    most_shots: int | None = 0
    has_parts: bool = False
    by_question: bool = True


# The first six are those of arXiv 2311.07052, with its shots. Its numbers of shots and of answers
# straight away are InstructEval's (arXiv 2306.04757): BBH asks for the answer without reasoning,
# DROP counts exact matches.
SETS = {
    one.name: one
    for one in (
        BenchmarkSet(
            "mmlu", "MMLU", "cais/mmlu", "mmlu/default", "mmlu_", "acc,none", 5, 5, has_parts=True
        ),
        BenchmarkSet(
            "ceval",
            "C-Eval",
            "ceval/ceval-exam",
            "ceval",
            "ceval-valid_",
            "acc,none",
            5,
            5,
            has_parts=True,
            by_question=False,
        ),
        BenchmarkSet("drop", "DROP", "EleutherAI/drop", "drop", "drop", "em,none", 3, None),
        BenchmarkSet(
            CODE, "HumanEval", "openai/openai_humaneval", "humaneval", CODE, "pass@1,create_test"
        ),
        BenchmarkSet(
            "bbh",
            "BBH",
            "SaylorTwift/bbh",
            "bbh/fewshot",
            "bbh_fewshot_",
            "exact_match,strip",
            3,
            3,
            has_parts=True,
        ),
        BenchmarkSet(
            "gsm8k",
            "GSM8K",
            "openai/gsm8k",
            "gsm8k",
            "gsm8k",
            "exact_match,strict-match",
            8,
            None,
        ),
        BenchmarkSet(
            "bbh_cot",
            "BBH, reasoned",
            "SaylorTwift/bbh",
            "bbh/cot_fewshot",
            "bbh_cot_fewshot_",
            "exact_match,get-answer",
            3,
            3,
            has_parts=True,
        ),
        BenchmarkSet(
            "blimp",
            "BLiMP",
            "nyu-mll/blimp",
            "blimp",
            "blimp_",
            "acc,none",
            has_parts=True,
            by_question=False,
        ),
        BenchmarkSet(
            "lambada",
            "LAMBADA",
            "EleutherAI/lambada_openai",
            "lambada",
            "lambada_openai",
            "acc,none",
        ),
        BenchmarkSet("piqa", "PIQA", "baber/piqa", "piqa", "piqa", "acc,none"),
    )
}
SIX = ("mmlu", "ceval", "drop", "humaneval", "bbh", "gsm8k")
NAMES = (*SETS, HELDOUT)


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names parted by commas, each once; UserError names the nearest of an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {text!r} names no task: take some of {', '.join(NAMES)}")
    for name in names:
        check_task(name)
    return tuple(dict.fromkeys(names))


def check_task(name: str) -> None:
    """UserError for a name that is no set's."""
    if name in NAMES:
        return
    known = {one.casefold(): one for one in NAMES}
    near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.4)
    guess = f"did you mean {known[near[0]]}? " if near else ""
    raise UserError(f"unknown task {name!r}: {guess}there are {', '.join(NAMES)}")


def parse_shots(texts: list[str]) -> dict[str, int]:
    """`["mmlu=0"]` as a dict; UserError where one is not NAME=NUMBER."""
    found = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not equals or not number.strip().isdecimal():
            raise UserError(f"--shots {text!r}: write it as NAME=NUMBER, such as mmlu=0")
        found[name.strip()] = int(number)
    return found


def check_shots(shots: Mapping[str, int]) -> None:
    """UserError for an unknown set, and for more examples than a set has."""
    for name, number in shots.items():
        check_task(name)
        most = SETS[name].most_shots if name in SETS else 0
        if number < 0 or (most is not None and number > most):
            allowed = "0" if most == 0 else f"0 to {most}" if most else "0 or more"
            raise UserError(f"--shots {name}={number}: {name} takes {allowed}")
