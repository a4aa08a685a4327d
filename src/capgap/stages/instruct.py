"""The stage `instruct`: a model learns to answer from conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from capgap.stage import Say, ShouldStop
from capgap.stages.tuning import Rate, Share, Tuning, TuningRun, TuningSection, usable_texts
from capgap.tune.conversations import Conversation, Reading, read_conversations

if TYPE_CHECKING:
    from capgap.evaluate.heldout import HeldoutLoss
    from capgap.tune.template import Example

STAGE = "instruct"
# TRL's names of what a step tells, and ours
NUMBERS = {"epoch": "epoch", "mean_token_accuracy": "token_accuracy"}


class InstructSection(TuningSection):
    """The student learns to answer from conversations."""

    neftune: Annotated[Rate | None, "Noise on the embeddings, such as 5 (2310.05914)."] = None
    system: Annotated[
        str, "System prompt of conversations without one; goes into the template."
    ] = ""


class Instruct(InstructSection, Tuning):
    """Teach a model to answer from conversations; the same command continues a stopped run."""

    template: Annotated[str, "minichat, or the tokenizer's own."] = "minichat"
    lora_dropout: Annotated[Share, "Dropout on their inputs."] = 0.05

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Tunes the model on the assistant's turns, writes OUT/model; returns instruct.json."""
        return _run(self, say, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        made = f"{found['data']['training']:,} conversations, {found['steps']:,} steps"
        told = f"{made}, {found['folder']}"
        if found["before"] is None:
            return told
        before, after = found["before"]["loss"], found["after"]["loss"]
        return f"held-out loss of the answers {before:.4f} -> {after:.4f} nats a token\n{told}"


def _run(request: Instruct, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    run = TuningRun(request, STAGE, say)
    if run.finished:
        return run.record
    reading = read_conversations(request.data)
    examples = _examples(run, reading)
    if not request.skip_bad:
        reading.findings.refuse(request.data)
    training, heldout = run.split(examples)
    counts = {
        "lines": reading.num_lines,
        "training": len(training),
        "heldout": len(heldout),
        "tokens": sum(len(one.ids) for one in training),
        "answer_tokens": sum(one.num_counted for one in training),
    }
    run.begin(counts, reading.findings)
    _tune(run, request, training, heldout, should_stop)
    return run.record


def _tune(
    run: TuningRun,
    request: Instruct,
    training: "Sequence[Example]",
    heldout: "Sequence[Example]",
    should_stop: ShouldStop,
) -> None:
    from capgap.tune.scores import answer_set, score_answers
    from capgap.tune.training import instruct_model

    model = run.load()
    answers = answer_set(run.tokenizer, heldout) if heldout else None
    if "before" not in run.record:
        before = None if answers is None else score_answers(model, answers, bf16=run.bf16)
        run.keep(before=_told(before))
    with run.steps(NUMBERS) as on_step:
        tuned = instruct_model(
            model,
            run.tokenizer,
            training,
            run.settings,
            run.checkpoints,
            neftune=request.neftune,
            on_step=on_step,
            should_stop=should_stop,
        )
    after = None if answers is None else score_answers(tuned.model, answers, bf16=run.bf16)
    run.finish(
        tuned,
        after=_told(after),
        tokens_read=request.epochs * run.record["data"]["tokens"],
        tokens_trained=request.epochs * run.record["data"]["answer_tokens"],
    )


def _examples(run: TuningRun, reading: Reading[Conversation]) -> "list[Example]":
    """Every usable conversation in tokens that the window holds."""
    from capgap.tune.template import encode, fitted

    def texts(one: Conversation) -> list[str]:
        return [message["content"] for message in one.messages]

    found = []
    for one in usable_texts(reading, run.tokenizer, texts):
        whole = encode(run.tokenizer, one.messages, one.line)
        example = fitted(whole, run.window)
        if example is None:
            reading.findings.add("left_out", one.line)
            continue
        if example is not whole:
            reading.findings.add("cut", one.line)
        found.append(example)
    return found


def _told(loss: "HeldoutLoss | None") -> dict[str, Any] | None:
    """Nats per token of the held-out answers; None where none are held out."""
    if loss is None:
        return None
    return {
        "loss": loss.loss,
        "loss_stderr": loss.loss_stderr,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": sum(loss.document_tokens),
    }
