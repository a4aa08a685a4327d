"""The evaluation sets by name: what the harness calls them, shots, and which number counts.

Imports no torch and no harness.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

# Its loss is measured here, not by the harness
HELDOUT = "heldout"
CODE = "humaneval"


class NotMeasured(Exception):
    """Why a set cannot be measured; the others can."""


@dataclass(frozen=True)
class BenchmarkSet:
    """An evaluation set.

    `title` as people write it; `hub` its dataset on the Hub. `folder` under the harness' tasks, and
    `task` its only task there or, ending in _, the beginning of every part's. `shots` by default
    and at most, where they are not drawn from a training part. `metric`: the score that counts, as
    the harness calls it. `by_question`: the score is the mean over all questions, not over the
    parts.
    """

    name: str
    title: str
    hub: str
    folder: str
    task: str
    shots: int = 0
    metric: str = "acc,none"
    shots_are_drawn: bool = False
    by_question: bool = True

    @property
    def has_parts(self) -> bool:
        return self.task.endswith("_")


# The first six are those of arXiv 2311.07052, with its shots. Its numbers of shots and of answers
# straight away are InstructEval's (arXiv 2306.04757): BBH asks for the answer without reasoning,
# DROP counts exact matches.
SETS = {
    one.name: one
    for one in (
        BenchmarkSet("mmlu", "MMLU", "cais/mmlu", "mmlu/default", "mmlu_", 5),
        BenchmarkSet(
            "ceval", "C-Eval", "ceval/ceval-exam", "ceval", "ceval-valid_", 5, by_question=False
        ),
        BenchmarkSet(
            "drop", "DROP", "EleutherAI/drop", "drop", "drop", 3, "em,none", shots_are_drawn=True
        ),
        BenchmarkSet(
            CODE, "HumanEval", "openai/openai_humaneval", "humaneval", CODE, 0, "pass@1,create_test"
        ),
        BenchmarkSet(
            "bbh", "BBH", "SaylorTwift/bbh", "bbh/fewshot", "bbh_fewshot_", 3, "exact_match,strip"
        ),
        BenchmarkSet(
            *("gsm8k", "GSM8K", "openai/gsm8k", "gsm8k", "gsm8k", 8, "exact_match,strict-match"),
            shots_are_drawn=True,
        ),
        BenchmarkSet(
            *("bbh_cot", "BBH, reasoned", "SaylorTwift/bbh", "bbh/cot_fewshot", "bbh_cot_fewshot_"),
            shots=3,
            metric="exact_match,get-answer",
        ),
        BenchmarkSet("blimp", "BLiMP", "nyu-mll/blimp", "blimp", "blimp_", by_question=False),
        BenchmarkSet(
            "lambada", "LAMBADA", "EleutherAI/lambada_openai", "lambada", "lambada_openai"
        ),
        BenchmarkSet("piqa", "PIQA", "baber/piqa", "piqa", "piqa"),
    )
}
SIX = ("mmlu", "ceval", "drop", "humaneval", "bbh", "gsm8k")
NAMES = (*SETS, HELDOUT)


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once; ValueError for none, and for one that is no set's, with the nearest."""
    known = {one.casefold(): one for one in NAMES}
    for name in filter(None, names):
        if name not in NAMES:
            near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.4)
            guess = f"did you mean {known[near[0]]}? " if near else ""
            raise ValueError(f"unknown task {name!r}: {guess}there are {', '.join(NAMES)}")
    if not any(names):
        raise ValueError(f"names no task: take some of {', '.join(NAMES)}")
    return tuple(dict.fromkeys(filter(None, names)))


def parse_shots(texts: Sequence[str], tasks: Sequence[str]) -> dict[str, int]:
    """`["mmlu=0"]` as a dict.

    ValueError where one is not NAME=NUMBER, for a set that is not among `tasks`, and for more
    examples than it has.
    """
    found = {}
    for text in texts:
        name, equals, digits = (part.strip() for part in text.partition("="))
        if not equals or not digits.isdecimal():
            raise ValueError(f"write {text!r} as NAME=NUMBER, such as mmlu=0")
        if name not in tasks:
            raise ValueError(f"{name} is not among the tasks {', '.join(tasks)}")
        most = SETS[name].shots if name in SETS else 0
        if int(digits) > most and not (name in SETS and SETS[name].shots_are_drawn):
            raise ValueError(f"{name} takes {f'0 to {most}' if most else 0}")
        found[name] = int(digits)
    return found
