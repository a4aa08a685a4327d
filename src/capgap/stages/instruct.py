"""The stage `instruct`: a model learns to answer from conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from capgap.stages.tuning import Rate, Sample, Share, SystemPrompt, Tuning, TuningSection
from capgap.tune.conversations import Conversation, Reading, read_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from capgap.evaluate.losses import HeldoutLoss
    from capgap.tune.training import Job, Tuned


class InstructSection(TuningSection):
    """The student learns to answer from conversations."""

    neftune: Annotated[Rate | None, "Noise on the embeddings, such as 5 (2310.05914)."] = None
    system: SystemPrompt = ""


class Instruct(InstructSection, Tuning):
    """Teach a model to answer from conversations; the same command continues a stopped run."""

    numbers: ClassVar = {"epoch": "epoch", "mean_token_accuracy": "token_accuracy"}

    template: Annotated[str, "minichat, or the tokenizer's own."] = "minichat"
    lora_dropout: Annotated[Share, "Dropout on their inputs."] = 0.05

    def read(self) -> Reading[Conversation]:
        return read_conversations(self.data)

    def sample(
        self, tokenizer: "PreTrainedTokenizerFast", item: Conversation, window: int
    ) -> tuple[Sample | None, str]:
        """Cut behind the last answer that ends within the window."""
        from capgap.tune.template import encode, fitted

        whole = encode(tokenizer, item.messages)
        example = fitted(whole, window)
        if example is None:
            return None, "left_out"
        sample = Sample((example,), {"input_ids": example.ids, "labels": example.labels})
        return sample, "" if example is whole else "cut"

    def train(self, job: "Job") -> "Tuned":
        from capgap.tune.training import instruct_model

        return instruct_model(job, neftune=self.neftune)

    def scores(
        self, losses: "Sequence[HeldoutLoss]", before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Nats per token of the held-out answers."""
        values = losses[0].as_dict()
        return {name: values[name] for name in ("loss", "loss_stderr", "bits_per_byte", "tokens")}

    def told(self, found: dict[str, Any]) -> str:
        made = f"{found['data']['training']:,} conversations, {found['steps']:,} steps"
        told = f"{made}, {found['folder']}"
        if found["before"] is None:
            return told
        before, after = found["before"]["loss"], found["after"]["loss"]
        return f"held-out loss of the answers {before:.4f} -> {after:.4f} nats a token\n{told}"
