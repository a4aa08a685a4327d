"""Whether a model reads a text as its makers let it begin: tried with what else may stand first."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from capgap.corpus.tokens import HeldoutDocument, Marks
from capgap.evaluate.losses import evaluate_heldout, heldout_set
from capgap.evaluate.measured import HeldoutLoss, ratio_standard_error
from capgap.models.parallel import ALONE, Ranks
from capgap.models.parts import Parts

DOCUMENTS = 16
# Of each document; what a missing first token costs shows in the first ones
TOKENS = 256
# Nats a token that another beginning must gain, and how many of its standard errors
GAIN, STANDARD_ERRORS = 0.05, 3.0


def better_beginning(
    name: str,
    parts: Parts,
    documents: Sequence[HeldoutDocument],
    marks: Marks,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocabulary: int | None = None,
    ranks: Ranks = ALONE,
) -> str | None:
    """A warning in one line of the beginning that the model of this name is much better with than
    with `marks`, or None.

    Tried are the special tokens that the tokenizer knows but does not put first, before documents;
    and windows that begin within a document, with and without the token that begins one.
    """
    some = documents[:DOCUMENTS]

    def loss(rows: Sequence[HeldoutDocument], begin: int | None = None) -> HeldoutLoss:
        """`begin`: in place of the first token of every row."""
        if begin is not None:
            rows = [HeldoutDocument(np.r_[begin, row.tokens[1:]], row.num_bytes) for row in rows]
        cut = replace(marks, begin_windows=False)
        return evaluate_heldout(parts, heldout_set(rows, cut, TOKENS, vocabulary), ranks)

    def named(token: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(token))

    better: list[tuple[float, str]] = []

    def compare(now: HeldoutLoss, other: HeldoutLoss, what: str, fix: str) -> None:
        gains = np.subtract(now.document_losses, other.document_losses).tolist()
        error = ratio_standard_error(gains, now.document_tokens)
        if error is not None and now.loss - other.loss > max(GAIN, STANDARD_ERRORS * error):
            line = (
                f"warning: {name} reads this text at {now.loss:.3f} nats a token, and at "
                f"{other.loss:.3f} where {what}: {fix}"
            )
            better.append((now.loss - other.loss, line))

    starts = [HeldoutDocument(tokens[: TOKENS + 1], size) for tokens, size in some]
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, marks.end} - {None, marks.begin}
    if others:
        now = loss(starts)
        for token in sorted(others):
            fix = (
                "is the tokenizer beside it its own? The corpus must be prepared with a tokenizer "
                f"that puts {named(token)} first (add_bos_token in tokenizer_config.json)"
            )
            compare(now, loss(starts, token), f"documents begin with {named(token)}", fix)
    middles = [
        HeldoutDocument(tokens[len(tokens) // 2 :][: TOKENS + 1], size)
        for tokens, size in some
        if len(tokens) > 3
    ]
    if middles and marks.begin != marks.end:
        plain, begun = loss(middles), loss(middles, marks.begin)
        now, other = (begun, plain) if marks.begin_windows else (plain, begun)
        have, how = ("no ", "without") if marks.begin_windows else ("", "with")
        what = f"windows that begin within a document have {have}{named(marks.begin)} first"
        compare(now, other, what, f"prepare the corpus {how} `--begin-windows`")
    return max(better, key=lambda one: one[0], default=(0.0, None))[1]
