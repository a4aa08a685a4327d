"""Evaluation sets by lm-evaluation-harness (0.4.13), on a model that is loaded already.

The harness' own task files say what is asked and how it is scored; what is ours: where the records
come from, HumanEval's programs in `code_runner`, and what is counted beside.
"""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import datasets
import lm_eval.tasks
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from capgap.corpus.tokens import Marks
from capgap.errors import first_line
from capgap.evaluate.code_runner import SANDBOX, run_program, sandbox_problem
from capgap.evaluate.scores import Metrics, Part, combine
from capgap.evaluate.sets import CODE, BenchmarkSet, NotMeasured
from capgap.evaluate.sources import LocalSet
from capgap.stage import Say, paced

# Decides which examples stand before a question, where they are drawn; the harness' own
SHOT_SEED = 1234
TASKS = Path(lm_eval.tasks.__file__).parent
SAID_EVERY = 10.0  # seconds
# Where the harness draws progress bars
DRAWN_IN = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


class CountingModel(HFLM):
    """The harness' model that also counts the questions whose prompt it had to cut; the model stays
    where it is.

    `cut` has (task, number of the question). Log-likelihoods are in float32 whatever the weights.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int
    ) -> None:
        self.cut: set[tuple[str, int]] = set()
        self._asked: Sequence[Any] = ()
        own = model.generation_config
        if own is not None:
            # of the folder's own only what ends an answer: it may ask for a million beams
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            ends = {name: getattr(own, name) for name in names}
            model.generation_config = GenerationConfig(**ends)
        with quiet_harness():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype="float32",
                prefix_token_id=Marks.of(tokenizer).begin,
            )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._asked = requests
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        if any(math.isnan(value) for value, _ in answers):
            raise NotMeasured("log-likelihoods are not finite: try dtype fp32")
        return answers

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        for asked, (_, context, answer) in zip(self._asked, requests, strict=True):
            if len(answer) > self.max_length:
                raise NotMeasured(
                    f"an answer has {len(answer)} tokens, more than the {self.max_length} that "
                    "the model reads"
                )
            if len(context) + len(answer) > self.max_length + 1:
                self.cut.add((asked.task_name, asked.doc_id))
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        for asked in requests:
            prompt, options = asked.args
            room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
            if len(self.tok_encode(prompt)) > room:
                self.cut.add((asked.task_name, asked.doc_id))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, *arguments: Any, **options: Any) -> Any:
        processors = LogitsProcessorList([_MustBeNumbers()])
        return super()._model_generate(*arguments, logits_processor=processors, **options)


class _MustBeNumbers(LogitsProcessor):
    """Looks at every step of an answer. What is ruled out, minus infinity, is no fault."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise NotMeasured("logits are not finite: try dtype fp32")
        return scores


def part_names(one: BenchmarkSet) -> tuple[str, ...]:
    """The names of a set's parts; ("",) for a set without parts."""
    if not one.has_parts:
        return ("",)
    names = _manager(one).all_subtasks
    return tuple(name.removeprefix(one.task) for name in names if name.startswith(one.task))


def load_tasks(
    one: BenchmarkSet, local: LocalSet | None, shots: int, *, outcomes: Counter[str]
) -> dict[str, Any]:
    """The harness' tasks of a set by their names there, with the records of a local copy or, where
    it is None, of the Hub. How HumanEval's programs end is counted in `outcomes`.

    NotMeasured where the Hub's dataset cannot be loaded.
    """
    own = _humaneval(one, outcomes) if one.name == CODE else _changes(one, local)
    specs = []
    for part in part_names(one):
        records = {} if local is None else {"custom_dataset": _records(local[part])}
        specs.append({"task": one.task + part} | own | records)
    try:
        with quiet_harness():
            # a whole task stands alone: in a group it would be looked up among the harness' own
            whole = specs if one.name == CODE else [{"group": "capgap", "task": specs}]
            tasks = _manager(one).load(whole)["tasks"]
    # A loader of the Hub raises whatever its parts raise; the cause goes into the record
    except Exception as error:
        if local is not None:
            raise
        cause = f"{one.hub} cannot be loaded from the Hub: {first_line(error)}"
        raise NotMeasured(cause) from error
    for task in tasks.values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SHOT_SEED)
    return dict(tasks)


def run_set(
    one: BenchmarkSet,
    model: CountingModel,
    local: LocalSet | None,
    *,
    shots: int,
    limit: int | None = None,
    say: Say = lambda text: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the record has of a model on a set, on the first `limit` questions of every part; and
    every question with its prompt and what the model answered.

    NotMeasured for a set that this model cannot be measured on.
    """
    began = time.monotonic()
    is_code = one.name == CODE
    problem = sandbox_problem() if is_code else None
    if problem is not None:
        raise NotMeasured(problem)
    outcomes: Counter[str] = Counter()
    tasks = load_tasks(one, local, shots, outcomes=outcomes)
    lowered = _fit_answers(tasks, model)
    if lowered is not None:
        say(
            f"{one.name}: answers of at most {lowered['used']} tokens, not {lowered['asked']}: "
            f"the model reads {model.max_length}"
        )
    model.cut.clear()
    with quiet_harness(lambda text: say(f"{one.name}: {text}")):
        found = evaluate(
            model,
            {"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit,
            # closed forms only: its bootstrap starts a process for every core
            bootstrap_iters=1,
            confirm_run_unsafe_code=is_code,
        )
    parts = {
        name.removeprefix(one.task): Part(
            _metrics(found["results"][name], found["samples"][name]),
            found["n-samples"][name]["effective"],
            found["n-samples"][name]["original"],
            sum(task == name for task, _ in model.cut),
        )
        for name in tasks
    }
    scores = combine(one, parts) | {
        "shots": shots,
        "task_version": ", ".join(sorted({str(found["versions"][name]) for name in tasks})),
        "max_gen_toks": lowered,
        "programs": dict(outcomes) if is_code else None,
        "sandbox": SANDBOX if is_code else None,
        "seconds": round(time.monotonic() - began, 1),
    }
    samples = [
        {"set": one.name, "task": name} | _sample(sample)
        for name in tasks
        for sample in found["samples"][name]
    ]
    return scores, samples


def _manager(one: BenchmarkSet) -> Any:
    # all of the harness' task files would take most of a minute to read
    folder = [] if one.name == CODE else [TASKS / one.folder]
    return TaskManager(include_defaults=False, include_path=folder)


def _records(splits: Mapping[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    """What the harness calls, with arguments of no use here, for a task's records."""
    return lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(records) for split, records in splits.items()}
    )


def _changes(one: BenchmarkSet, local: LocalSet | None) -> dict[str, Any]:
    """Where a task is not taken as the harness has it."""
    if one.name == "piqa" and local is not None:
        # the local copy has no such part, and no examples are drawn from it
        return {"training_split": None}
    if one.name == "lambada":
        # its own perplexity would be bootstrapped
        return {
            "metric_list": [
                {"metric": "perplexity", "aggregation": _perplexity, "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ]
        }
    if one.name == "bbh":
        # a model writes the space before its answer, and the wanted answers have none
        steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
        return {"filter_list": [{"name": "strip", "filter": steps}]}
    return {}


def _perplexity(log_likelihoods: Sequence[float]) -> float:
    """Of whole words, as the harness has it; infinite where no float holds it."""
    mean = -fmean(log_likelihoods)
    return math.exp(mean) if mean < 700 else math.inf


def _humaneval(one: BenchmarkSet, outcomes: Counter[str]) -> dict[str, Any]:
    """The harness' task with programs run by `code_runner`; its own file asks the Hub as soon as
    it is read, for code that runs them in this process."""

    def pass_at_1(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
        passed = 0
        for tests, written in zip(references, predictions, strict=True):
            outcome = run_program(f"{written[0]}\n{tests}")
            passed += outcome.passed
            outcomes["passed" if outcome.passed else str(outcome.reason).partition(":")[0]] += 1
        return {"pass@1": passed / len(references)}

    def whole_programs(answers: Any, questions: Any) -> list[list[str]]:
        pairs = zip(answers, questions, strict=True)
        return [[question["prompt"] + text for text in texts] for texts, question in pairs]

    join = {"function": "custom", "filter_fn": whole_programs}
    return {
        "dataset_path": one.hub,
        "unsafe_code": True,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "metric_list": [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "filter_list": [{"name": "create_test", "filter": [join]}],
        "metadata": {"version": 1.0},
    }


def _fit_answers(tasks: Mapping[str, Any], model: CountingModel) -> dict[str, int] | None:
    """Lets no answer take more than half of what the model reads: the harness would refuse, or cut
    the prompt for it. Returns the two numbers where a task asks for more."""
    most = model.max_length // 2
    lowered = None
    for task in tasks.values():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        asked = (task.config.generation_kwargs or {}).get("max_gen_toks", model.max_gen_toks)
        if asked > most:
            task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
            lowered = {"asked": asked, "used": most}
    return lowered


def _metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Metrics:
    """The harness' numbers by its names for them, each with its standard error."""
    metrics = {}
    for name, value in results.items():
        metric, comma, kind = name.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        if metric == "perplexity" and len(samples) > 1:
            # to first order, from the standard error of the mean
            spread = stdev(sample["perplexity"] for sample in samples)
            error = value * (spread / math.sqrt(len(samples)))
        metrics[name] = (_finite(value), _finite(error))
    return metrics


def _finite(value: Any) -> float | None:
    """None where the harness has no number ("N/A"), or none that is finite."""
    is_number = isinstance(value, int | float)
    return float(value) if is_number and math.isfinite(value) else None


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants to see of a question."""
    prompt, answer = sample["arguments"][0]
    is_choice = isinstance(answer, str)
    return {
        "question": sample["doc_id"],
        "filter": sample["filter"],
        "prompt": prompt,
        "answers": [arguments[1] for arguments in sample["arguments"]] if is_choice else None,
        "responses": [response[0] for response in sample["resps"]],
        "target": sample["target"],
        "scores": {name: sample[name] for name in sample["metrics"]},
    }


@contextmanager
def quiet_harness(say: Say = lambda text: None) -> Iterator[None]:
    """Lines of ours in place of the harness' progress bars, and none of its warnings: what they
    say is in the record. All is as before afterwards."""
    logger = logging.getLogger("lm_eval")
    bar = partial(_Bar, paced(say, SAID_EVERY), itertools.count(1))
    with ExitStack() as after:
        after.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            after.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        for module in DRAWN_IN:
            after.enter_context(mock.patch(f"{module}.tqdm", bar))
        yield


class _Bar:
    """Stands where the harness draws a bar; `prompts` counts those of all bars."""

    def __init__(
        self,
        tell: Callable[[Callable[[], str]], None],
        prompts: Iterator[int],
        items: Any = None,
        total: int | None = None,
        desc: str = "",
        **_: Any,
    ) -> None:
        self.tell, self.prompts, self.items, self.what, self.done = tell, prompts, items, desc, 0
        self.total = len(items) if total is None and items is not None else total

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.what:
            kind = "answers" if self.what.startswith("Running") else "requests cut into tokens"
            self.tell(lambda: f"{self.done:,} of {self.total:,} {kind}")
        else:
            # prompts are made part by part, and how many parts there are no bar knows
            made = next(self.prompts)
            self.tell(lambda: f"{made:,} prompts made")

    def close(self) -> None:
        pass
