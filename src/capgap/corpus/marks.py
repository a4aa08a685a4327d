"""The tokens that a model's texts begin and end with: decided here for everything that reads text.

Corpora, held-out text, scores, caches, measuring, sampling and benchmarks all ask this file, so
that a model reads what it read while its makers trained it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names for the end of a text. A chat model's `eos_token` often is the end of a turn instead; where
# it bears none of these names, the first of them that the tokenizer has ends a text.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<EOS_TOKEN>", "[EOS]")


@dataclass(frozen=True)
class Marks:
    """Token ids around a document.

    Attributes:
        begin: stands before a document's first token, as context alone: what the tokenizer itself
            puts first, or `end` where it puts nothing there.
        end: stands behind a document's last token: the model's end of text, not of a chat turn.
        begin_windows: whether every training window, and every row of a long document, begins
            with `begin` too, in place of the token before it.
    """

    begin: int
    end: int
    begin_windows: bool

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", *, begin_windows: bool = False) -> "Marks":
        """Those of a tokenizer. `begin_windows` is for those that put a token of their own first.

        Raises:
            UserError: the tokenizer has no token that ends a text.
        """
        own, end = first_token(tokenizer), end_of_text(tokenizer)
        if end is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no eos token to end a document with"
            )
        return cls(end if own is None else own, end, begin_windows and own is not None)

    @property
    def between(self) -> NDArray[np.int64]:
        """What parts two documents, int64 [1 or 2]: the end of one and the beginning of the next,
        once where both are one token."""
        both = [self.end] if self.begin == self.end else [self.end, self.begin]
        return np.array(both, dtype=np.int64)

    def begun(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows [num_windows, window + 1] as a model reads them; changed in place.

        A window that the corpus begins anew at its second token keeps its first: no document has
        two first tokens.
        """
        if self.begin_windows:
            windows[windows[:, 1] != self.begin, 0] = self.begin
        return windows

    def positions(self, inputs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places within their documents of the tokens of packed windows, int64 [num_windows, seq].

        Counting begins anew at every `begin`, as in evaluation; a window's beginning counts as one.

        Args:
            inputs: token ids, int64 [num_windows, seq].
        """
        places = np.arange(inputs.shape[1])
        starts = np.maximum.accumulate(np.where(inputs == self.begin, places, 0), axis=1)
        return places - starts

    def rows(self, tokens: NDArray[np.int64], window: int) -> list[NDArray[np.int64]]:
        """A document [1 + tokens], `begin` first, in pieces of at most 1 + window tokens; the first
        of each is context alone."""
        pieces = [tokens[at : at + window + 1] for at in range(0, len(tokens) - 1, window)]
        if self.begin_windows:
            pieces = [np.r_[tokens[:1], piece[1:]] for piece in pieces]
        return pieces

    def document(self, ids: NDArray[np.int64], *, whole: bool) -> NDArray[np.int64]:
        """A text's ids between its marks; without the end where the text goes on."""
        return np.r_[self.begin, ids, [self.end] * whole].astype(np.int64)


def first_token(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The token that the tokenizer itself puts before a text, the last if these are several."""
    text = "a"
    bare = tokenizer.encode(text, add_special_tokens=False)
    written = tokenizer.encode(text)
    for start in range(len(written) - len(bare) + 1):
        if written[start : start + len(bare)] == bare:
            return int(written[start - 1]) if start else None
    return None


def end_of_text(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The token that ends a text: `eos_token`, unless that is a chat model's end of a turn."""
    if tokenizer.eos_token not in END_OF_TEXT:
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        for name in END_OF_TEXT:
            if name in special:
                return int(special[name])
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
