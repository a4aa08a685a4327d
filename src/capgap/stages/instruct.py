"""The stages `instruct` and `prefer`: a model learns to answer from conversations, and of two
answers to a prompt the better one becomes the likelier (DPO)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from capgap.errors import UserError
from capgap.section import Count, PositiveFinite
from capgap.stage import HOW, Mark
from capgap.stages.tuning import Sample, Scores, Share, SystemPrompt, Tuning, TuningSection
from capgap.tune import conversations
from capgap.tune.conversations import Conversation, Pair, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from capgap.corpus.tokens import Corpus
    from capgap.evaluate.measured import HeldoutLoss

# Of plain text beside conversations
TEXT_WINDOW = 512


class InstructSection(TuningSection):
    """The student learns to answer from conversations."""

    neftune: Annotated[
        PositiveFinite | None, "Noise on the embeddings, such as 5 (2310.05914)."
    ] = None
    text_share: Annotated[
        Share, "Of the tokens that are learnt, plain text: it is forgotten less (docs/chat.md)."
    ] = 0.0
    system: SystemPrompt = ""


class Instruct(InstructSection, Tuning):
    """Teach a model to answer from conversations; the same command continues a stopped run."""

    lines: ClassVar = "conversations"
    numbers: ClassVar = {"mean_token_accuracy": "token_accuracy"}
    options: ClassVar = {"neftune_noise_alpha": "neftune"}

    template: Annotated[str, "minichat, or the tokenizer's own."] = "minichat"
    lora_dropout: Annotated[Share, "Dropout on their inputs."] = 0.05

    def read(self) -> Reading[Conversation]:
        return conversations.read_conversations(self.data)

    def plain_rows(
        self, corpora: "Sequence[Corpus]", answer_tokens: int, window: int
    ) -> list[dict[str, Any]]:
        """Windows of all corpora alike, drawn by the seed: `text_share` of all that is learnt."""
        if not self.text_share:
            return []
        if not corpora:
            raise UserError(f"text_share {self.text_share:g} is of prepared text: give a `corpus`")
        from capgap.corpus.tokens import load_corpus

        window = min(window, TEXT_WINDOW)
        tokens = self.epochs * answer_tokens * self.text_share / (1 - self.text_share)
        rows = []
        for one in corpora:
            # a window has one token more, the target of its last
            text = load_corpus(one.directory, window=window - 1).train
            if not len(text):
                raise UserError(f"{one.directory} has less text than a window of {window}")
            drawn = random.Random(self.seed).choices(
                range(len(text)), k=round(tokens / window / len(corpora))
            )
            rows += [{"input_ids": ids, "labels": ids} for ids in text.windows_at(drawn).tolist()]
        return rows

    def sample(self, tokenizer: "Tokenizer", item: Conversation, window: int) -> Sample:
        """Cut behind the last answer that ends within the window."""
        from capgap.tune.template import encode, fitted

        whole = encode(tokenizer, item.messages)
        example = fitted(whole, window)
        if example is None:
            return Sample((), {}, "left_out")
        row = {"input_ids": example.ids, "labels": example.labels}
        return Sample((example,), row, "" if example is whole else "cut")

    def scores(self, losses: "Sequence[HeldoutLoss]", before: Scores | None) -> Scores:
        """Nats per token of the held-out answers."""
        values = losses[0].as_dict()
        return {name: values[name] for name in ("loss", "loss_stderr", "bits_per_byte", "tokens")}

    def change(self, before: Scores, after: Scores) -> str:
        losses = f"{before['loss']:.4f} -> {after['loss']:.4f}"
        return f"held-out loss of the answers {losses} nats a token"


class PreferSection(TuningSection):
    """The better of two answers becomes likelier (DPO, arXiv 2305.18290). Batch and learning rate
    are those of Zephyr (arXiv 2310.16944)."""

    data: Annotated[Path, HOW, Mark.FILE, "Prompts with a chosen and a rejected answer."]
    batch: Annotated[Count, "Pairs a step."] = 32
    learning_rate: Annotated[
        PositiveFinite, "Peak rate, reached after the warm-up; it falls as a cosine to 0."
    ] = 5e-7
    epochs: Annotated[Count, "Times that every pair is read."] = 1
    beta: Annotated[PositiveFinite, "How strongly the model holds to what it was."] = 0.1


class Prefer(PreferSection, Tuning):
    """Make the better of two answers likelier (DPO); the same command continues a stopped run."""

    lines: ClassVar = "pairs"
    numbers: ClassVar = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    options: ClassVar = {"beta": "beta"}

    def read(self) -> Reading[Pair]:
        return conversations.read_pairs(self.data)

    def sample(self, tokenizer: "Tokenizer", item: Pair, window: int) -> Sample:
        """Left out where the window does not hold both answers to their ends."""
        from trl.data_utils import common_prefix_length

        from capgap.tune.template import Example, encode, prompt_ids

        prompt, answers = prompt_ids(tokenizer, item.messages), (item.chosen, item.rejected)
        said = [{"role": "assistant", "content": answer} for answer in answers]
        whole = [encode(tokenizer, [*item.messages, answer]).ids for answer in said]
        if max(map(len, whole)) > window:
            return Sample((), {}, "left_out")
        # the answer alone counts, not those that the prompt has already
        start = min(common_prefix_length(prompt, ids) for ids in whole)
        chosen, rejected = (ids[start:] for ids in whole)
        row = {"prompt_ids": prompt[:start], "chosen_ids": chosen, "rejected_ids": rejected}
        texts = [Example(ids, [i >= start for i in range(len(ids))]) for ids in whole]
        return Sample(tuple(texts), row)

    def scores(self, losses: "Sequence[HeldoutLoss]", before: Scores | None) -> Scores:
        from capgap.tune.training import preference_scores

        return preference_scores(losses[0], losses[1], before, self.beta)

    def change(self, before: Scores, after: Scores) -> str:
        pairs = f"likelier in {before['chosen_likelier']:.0%} -> {after['chosen_likelier']:.0%}"
        return f"of the held-out pairs the chosen answer is {pairs}"
