"""The stage `prefer`: of two answers to a prompt the better one is to become the likelier (DPO)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from capgap.section import Count
from capgap.stage import HOW, Mark
from capgap.stages.tuning import Rate, Sample, Tuning, TuningSection
from capgap.tune.conversations import Message, Pair, Reading, read_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from capgap.evaluate.losses import HeldoutLoss
    from capgap.tune.training import Job, Tuned


class PreferSection(TuningSection):
    """The better of two answers becomes likelier (DPO, arXiv 2305.18290). Batch and learning rate
    are those of Zephyr (arXiv 2310.16944)."""

    data: Annotated[Path, HOW, Mark.FILE, "prompt, chosen, rejected, one a line (.jsonl)."]
    batch: Annotated[Count, "Pairs a step."] = 32
    learning_rate: Annotated[
        Rate, "Peak rate, reached after the warm-up; it falls as a cosine to 0."
    ] = 5e-7
    epochs: Annotated[Count, "Times that every pair is read."] = 1
    beta: Annotated[Rate, "How strongly the model holds to what it was."] = 0.1


class Prefer(PreferSection, Tuning):
    """Make the better of two answers likelier (DPO); the same command continues a stopped run."""

    numbers: ClassVar = {
        "epoch": "epoch",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
    }

    def read(self) -> Reading[Pair]:
        return read_pairs(self.data)

    def sample(
        self, tokenizer: "PreTrainedTokenizerFast", item: Pair, window: int
    ) -> tuple[Sample | None, str]:
        """Left out where the window does not hold both answers to their ends."""
        from capgap.tune.template import Example, encode, prompt_ids

        # the answer alone counts, not those that the prompt has already
        prompt = [False] * len(prompt_ids(tokenizer, item.prompt))
        row, texts = {"prompt": item.prompt}, []
        for side, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
            message: Message = {"role": "assistant", "content": answer}
            row[side] = [message]
            ids = encode(tokenizer, [*item.prompt, message]).ids
            texts.append(Example(ids, prompt + [True] * (len(ids) - len(prompt))))
        if max(len(text.ids) for text in texts) > window:
            return None, "left_out"
        return Sample(tuple(texts), row), ""

    def train(self, job: "Job") -> "Tuned":
        from capgap.tune.training import prefer_model

        return prefer_model(job, beta=self.beta)

    def scores(
        self, losses: "Sequence[HeldoutLoss]", before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """DPO's numbers of the held-out pairs."""
        from capgap.tune.scores import preference

        chosen, rejected = (answers.document_losses for answers in losses)
        reference = chosen, rejected
        if before is not None:
            reference = before["chosen_nats"], before["rejected_nats"]
        return preference(chosen, rejected, before=reference, beta=self.beta)

    def told(self, found: dict[str, Any]) -> str:
        told = f"{found['data']['training']:,} pairs, {found['steps']:,} steps, {found['folder']}"
        if found["before"] is None:
            return told
        before, after = (found[when]["chosen_likelier"] for when in ("before", "after"))
        pairs = f"likelier in {before:.0%} -> {after:.0%}"
        return f"of the held-out pairs the chosen answer is {pairs}\n{told}"
