"""Whether a model reads a text as its makers let it begin: tried with what else may stand first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from capgap.corpus.marks import Marks
from capgap.corpus.tokens import HeldoutDocument
from capgap.evaluate.losses import HeldoutLoss, evaluate_heldout, heldout_set
from capgap.evaluate.measured import ratio_standard_error
from capgap.models.parallel import ALONE, Ranks
from capgap.models.parts import Parts

DOCUMENTS = 16
# Of each document; what a missing first token costs shows in the first ones
TOKENS = 256
# Nats a token that another beginning must gain to be told, and how many of its standard errors
GAIN, STANDARD_ERRORS = 0.05, 3.0


@dataclass(frozen=True)
class Beginning:
    """One way for rows to begin, and the loss that a model has with it, nats a token."""

    what: str
    fix: str
    loss: float
    instead_of: float

    def warning(self, name: str) -> str:
        """In one line."""
        return (
            f"warning: {name} reads this text at {self.instead_of:.3f} nats a token, and at "
            f"{self.loss:.3f} where {self.what}: {self.fix}"
        )


def better_beginning(
    parts: Parts,
    documents: Sequence[HeldoutDocument],
    marks: Marks,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocabulary: int | None = None,
    ranks: Ranks = ALONE,
) -> Beginning | None:
    """The beginning that a model is much better with than with `marks`, or None.

    Tried are the special tokens that the tokenizer knows but does not put first, before documents;
    and windows that begin within a document, with and without the token that begins one.
    """
    some = documents[:DOCUMENTS]

    def loss(rows: Sequence[HeldoutDocument]) -> HeldoutLoss:
        cut = replace(marks, begin_windows=False)
        return evaluate_heldout(parts, heldout_set(rows, cut, TOKENS, vocabulary), ranks)

    def name(token: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(token))

    found = []
    starts = [HeldoutDocument(tokens[: TOKENS + 1], size) for tokens, size in some]
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, marks.end} - {None, marks.begin}
    if others:
        now = loss(starts)
        for token in sorted(others):
            fix = (
                "is the tokenizer beside it its own? The corpus must be prepared with a tokenizer "
                f"that puts {name(token)} first (add_bos_token in tokenizer_config.json)"
            )
            other = loss([_behind(token, document) for document in starts])
            found.append(_compare(now, other, f"documents begin with {name(token)}", fix))
    middles = [
        HeldoutDocument(tokens[len(tokens) // 2 :][: TOKENS + 1], size)
        for tokens, size in some
        if len(tokens) > 3
    ]
    if middles and marks.begin != marks.end:
        plain, begun = loss(middles), loss([_behind(marks.begin, one) for one in middles])
        now, other = (begun, plain) if marks.begin_windows else (plain, begun)
        have, how = ("no ", "without") if marks.begin_windows else ("", "with")
        what = f"windows that begin within a document have {have}{name(marks.begin)} first"
        found.append(_compare(now, other, what, f"prepare the corpus {how} `--begin-windows`"))
    better = [one for one in found if one is not None]
    return min(better, key=lambda one: one.loss - one.instead_of) if better else None


def _behind(token: int, document: HeldoutDocument) -> HeldoutDocument:
    return HeldoutDocument(np.r_[token, document.tokens[1:]], document.num_bytes)


def _compare(now: HeldoutLoss, other: HeldoutLoss, what: str, fix: str) -> Beginning | None:
    gain = now.loss - other.loss
    gains = np.subtract(now.document_losses, other.document_losses).tolist()
    error = ratio_standard_error(gains, now.document_tokens)
    if error is None or not gain > max(GAIN, STANDARD_ERRORS * error):
        return None
    return Beginning(what, fix, other.loss, now.loss)
