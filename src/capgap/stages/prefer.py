"""The stage `prefer`: of two answers to a prompt the better one is to become the likelier (DPO)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from capgap.section import Count
from capgap.stage import Say, ShouldStop
from capgap.stages.tuning import Rate, Tuning, TuningRun, TuningSection, usable_texts
from capgap.tune.conversations import Message, Pair, Reading, read_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from capgap.evaluate.heldout import HeldoutSet
    from capgap.tune.template import Example

STAGE = "prefer"
NUMBERS = {"epoch": "epoch", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class PreferSection(TuningSection):
    """The better of two answers becomes likelier (DPO, arXiv 2305.18290). Batch and learning rate
    are those of Zephyr (arXiv 2310.16944)."""

    data: Annotated[Path, "prompt, chosen, rejected, one a line (.jsonl)."]
    batch: Annotated[Count, "Pairs a step."] = 32
    learning_rate: Annotated[Rate, "Peak rate; it falls as a cosine to 0."] = 5e-7
    epochs: Annotated[Count, "Times that every pair is read."] = 1
    beta: Annotated[Rate, "How strongly the first model holds."] = 0.1


class Prefer(PreferSection, Tuning):
    """Make the better of two answers likelier (DPO); the same command continues a stopped run."""

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Tunes the model by DPO, writes OUT/model; returns prefer.json."""
        return _run(self, say, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        told = f"{found['data']['training']:,} pairs, {found['steps']:,} steps, {found['folder']}"
        if found["before"] is None:
            return told
        before, after = (found[when]["chosen_likelier"] for when in ("before", "after"))
        pairs = f"likelier in {before:.0%} -> {after:.0%}"
        return f"of the held-out pairs the chosen answer is {pairs}\n{told}"


@dataclass(frozen=True)
class _Encoded:
    """A pair as messages for TRL, and as tokens for the held-out scores."""

    messages: dict[str, list[Message]]
    chosen: "Example"
    rejected: "Example"


def _run(request: Prefer, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    run = TuningRun(request, STAGE, say)
    if run.finished:
        return run.record
    reading = read_pairs(request.data)
    pairs = _encoded(run, reading)
    if not request.skip_bad:
        reading.findings.refuse(request.data)
    training, heldout = run.split(pairs)
    counts = {
        "lines": reading.num_lines,
        "training": len(training),
        "heldout": len(heldout),
        "tokens": sum(len(one.chosen.ids) + len(one.rejected.ids) for one in training),
        "answer_tokens": sum(one.chosen.num_counted + one.rejected.num_counted for one in training),
    }
    run.begin(counts, reading.findings)
    _tune(run, request, training, heldout, should_stop)
    return run.record


def _tune(
    run: TuningRun,
    request: Prefer,
    training: Sequence[_Encoded],
    heldout: Sequence[_Encoded],
    should_stop: ShouldStop,
) -> None:
    from capgap.tune.scores import answer_set, preference
    from capgap.tune.training import prefer_model

    model = run.load()
    sides = None
    if heldout:
        sides = (
            answer_set(run.tokenizer, [one.chosen for one in heldout]),
            answer_set(run.tokenizer, [one.rejected for one in heldout]),
        )
    if "before" not in run.record:
        before = None
        if sides is not None:
            nats = _nats(run, model, sides)
            before = preference(*nats, before=nats, beta=request.beta)
        run.keep(before=before)
    with run.steps(NUMBERS) as on_step:
        tuned = prefer_model(
            model,
            run.tokenizer,
            [one.messages for one in training],
            run.settings,
            run.checkpoints,
            beta=request.beta,
            on_step=on_step,
            should_stop=should_stop,
        )
    after = None
    if sides is not None:
        before = run.record["before"]
        reference = before["chosen_nats"], before["rejected_nats"]
        nats = _nats(run, tuned.model, sides)
        after = preference(*nats, before=reference, beta=request.beta)
    run.finish(
        tuned,
        after=after,
        tokens_read=request.epochs * run.record["data"]["tokens"],
        tokens_trained=request.epochs * run.record["data"]["answer_tokens"],
    )


def _nats(
    run: TuningRun, model: "PreTrainedModel", sides: "tuple[HeldoutSet, HeldoutSet]"
) -> tuple[list[float], list[float]]:
    """Negative log-likelihoods of the chosen and the rejected answers."""
    from capgap.tune.scores import score_answers

    chosen, rejected = (score_answers(model, side, bf16=run.bf16) for side in sides)
    return chosen.document_losses, rejected.document_losses


def _encoded(run: TuningRun, reading: Reading[Pair]) -> list[_Encoded]:
    """Every usable pair of which the window holds both answers to their ends."""
    from capgap.tune.template import Example, encode, prompt_ids

    def texts(one: Pair) -> list[str]:
        return [*(message["content"] for message in one.prompt), one.chosen, one.rejected]

    def example(prompt: list[Message], answer: Message, begin: int, line: int) -> Example:
        whole = encode(run.tokenizer, [*prompt, answer], line)
        # the answer alone counts, not those that the prompt has already
        return Example(line, whole.ids, [False] * begin + [True] * (len(whole.ids) - begin))

    found = []
    for one in usable_texts(reading, run.tokenizer, texts):
        begin = len(prompt_ids(run.tokenizer, one.prompt))
        chosen: Message = {"role": "assistant", "content": one.chosen}
        rejected: Message = {"role": "assistant", "content": one.rejected}
        pair = _Encoded(
            {"prompt": one.prompt, "chosen": [chosen], "rejected": [rejected]},
            example(one.prompt, chosen, begin, one.line),
            example(one.prompt, rejected, begin, one.line),
        )
        if max(len(pair.chosen.ids), len(pair.rejected.ids)) > run.window:
            reading.findings.add("left_out", one.line)
        else:
            found.append(pair)
    return found
