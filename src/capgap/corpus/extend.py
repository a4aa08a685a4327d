"""More pieces for a BPE tokenizer, learnt on new text behind those it has: old ids stay.

Training goes on where it stopped. The old tokenizer cuts the new text, the most frequent pair of
neighbours becomes a piece, and so on, by the rule of BPE itself. All new merges come after the old
ones, so a text's new tokens are its old ones with some neighbours joined.
"""

import heapq
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capgap.corpus.tokenizer import GROUP_CHARACTERS, TokenCodec, bare_backend, grouped
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A pair must be so much rarer in the old text, by tokens, than in the new one: see decisions.md
OLD_SHARE = 0.01
# Of the new text's characters that are no piece, so many get one (as sentencepiece does)
CHARACTER_COVERAGE = 0.9995
LEAST_COUNT = 2
SPACE = "\u2581"  # how sentencepiece writes a space
BYTE = re.compile("<0x..>")
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

Pair = tuple[int, int]
Run = tuple[int, ...]


@dataclass(frozen=True)
class Extension:
    """A tokenizer with more pieces.

    Attributes:
        tokenizer: encodes and decodes as the old one but for the new pieces.
        first: id of the first new piece; below it are the old ones.
        origins: the old ids that each new piece is made of.
        refused: pairs that were frequent enough, but not so much rarer in the old text.
    """

    tokenizer: "PreTrainedTokenizerFast"
    first: int
    origins: tuple[tuple[int, ...], ...]
    refused: int

    @property
    def words(self) -> int:
        """Ids in all."""
        return self.first + len(self.origins)


def extend_tokenizer(
    tokenizer: "PreTrainedTokenizerFast",
    new: Sequence[bytes],
    pieces: int,
    *,
    old: Sequence[bytes] = (),
    old_share: float = OLD_SHARE,
) -> Extension:
    """Add up to `pieces` pieces that the new text has use for; a small text may give fewer. The
    `Extension` has the tokenizer, the first new id, and the old ids that each new one is made of.

    Args:
        tokenizer: byte-level BPE, or BPE with byte fallback as sentencepiece writes it.
        new: documents to learn on.
        pieces: how many; every one gets the next id.
        old: documents of the kind that the tokenizer was made for, whose tokens should stay.
        old_share: a pair becomes a piece only if it is rarer in the old text, by tokens, than this
            share of its rate in the new one.

    Raises:
        UserError: another kind of tokenizer, or nothing to learn.
    """
    if pieces < 1:
        raise UserError(f"{pieces} new pieces are none: ask for 1 or more")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    is_byte_level = TokenCodec(tokenizer).is_byte_level
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or affixes or not (is_byte_level or model.get("byte_fallback")):
        raise UserError(
            f"cannot extend this tokenizer ({model['type']}): it must be byte-level BPE, or BPE "
            "with byte fallback"
        )
    known = _Pieces(description, is_byte_level=is_byte_level)
    if not is_byte_level:
        for character in _missing_characters(tokenizer, known, new)[:pieces]:
            known.add(character, [known.ids[f"<0x{byte:02X}>"] for byte in character.encode()])
    new_runs, new_tokens = _count_runs(known, new)
    old_runs, old_tokens = _count_runs(known, old)
    pairs = _Pairs(known.names, new_runs, old_runs)
    refused = 0
    while len(known.origins) < pieces and (pair := pairs.pop()) is not None:
        parts = [known.names[i] for i in pair]
        name = "".join(parts)
        new_count, old_count = pairs.counts[pair]
        # a piece that other merges already lead to would set those off again
        if name in known.ids:
            continue
        if old_count / old_tokens > old_share * new_count / new_tokens:
            refused += 1
            continue
        model["merges"].append(parts)
        pairs.join(pair, known.add(name, pair))
    if not known.origins:
        raise UserError("the new text has no use for new pieces: no pair of tokens is frequent")
    extended = _with_backend(tokenizer, Tokenizer.from_str(json.dumps(description)))
    return Extension(extended, known.first, tuple(known.origins), refused)


class _Pieces:
    """A tokenizer's description and its pieces: `ids` by name (a part of the description), `names`
    by id. New ones are added from the id `first` on, with the old ids that they are made of."""

    def __init__(self, description: dict[str, Any], *, is_byte_level: bool) -> None:
        self.description = description
        self.ids: dict[str, int] = description["model"]["vocab"]
        # added tokens become entries, so that none is missing
        for token in description["added_tokens"]:
            self.ids.setdefault(token["content"], token["id"])
        self.names = {i: name for name, i in self.ids.items()}
        self.first = max(self.names) + 1
        self.origins: list[tuple[int, ...]] = []
        self._is_byte_level = is_byte_level
        self._alone = {token["id"] for token in description["added_tokens"]}
        self._alone.update(i for name, i in self.ids.items() if BYTE.fullmatch(name))

    def add(self, name: str, parts: Sequence[int]) -> int:
        """Add a piece that stands for these, old or new ones; returns its id."""
        number = self.first + len(self.origins)
        self.ids[name] = number
        self.names[number] = name
        old = ((i,) if i < self.first else self.origins[i - self.first] for i in parts)
        self.origins.append(tuple(itertools.chain.from_iterable(old)))
        return number

    def joins(self, left: int, right: int) -> bool:
        """Whether two neighbours may become one piece.

        A byte-level tokenizer cuts text into words before; one with byte fallback does not, and its
        pieces are words of letters or marks with the spaces before them. A digit stays alone.
        """
        if left in self._alone or right in self._alone:
            return False
        if self._is_byte_level:
            return True
        end, begin = _kind(self.names[left][-1]), _kind(self.names[right][0])
        if end == " ":
            return begin != "0" and not self.names[left].strip(SPACE)
        return end == begin and end != "0"


def _kind(character: str) -> str:
    """A space, a digit, a letter (with what combines with one) or another mark."""
    if character == SPACE:
        return " "
    if character.isdigit():
        return "0"
    return "a" if character.isalpha() or unicodedata.category(character)[0] == "M" else "."


def _missing_characters(
    tokenizer: "PreTrainedTokenizerFast", known: _Pieces, new: Sequence[bytes]
) -> list[str]:
    """The frequent characters that are no piece yet, by falling count; control characters stay
    bytes."""
    counts: Counter[str] = Counter()
    normalizer: Any = tokenizer.backend_tokenizer.normalizer
    for document in new:
        text = document.decode("utf-8", "ignore")
        counts.update(text if normalizer is None else normalizer.normalize_str(text))
    missing = [one for one in counts if one not in known.ids and one.isprintable()]
    missing.sort(key=lambda one: (-counts[one], one))
    left = (1 - CHARACTER_COVERAGE) * counts.total()
    while missing and (counts[missing[-1]] < LEAST_COUNT or counts[missing[-1]] <= left):
        left -= counts[missing.pop()]
    return missing


def _count_runs(known: _Pieces, documents: Sequence[bytes]) -> tuple[Counter[Run], int]:
    """Neighbours of one word that merges may join, two or more, and the tokens of all documents, 1
    at least. Bytes that are not UTF-8 teach nothing."""
    runs: Counter[Run] = Counter()
    tokens = 0
    backend = bare_backend(json.dumps(known.description))
    texts = (document.decode("utf-8", "ignore") for document in documents)
    for group in grouped(texts, len, GROUP_CHARACTERS):
        for encoding in backend.encode_batch(group, add_special_tokens=False):
            ids, words = encoding.ids, encoding.word_ids
            tokens += len(ids)
            borders = [
                at
                for at in range(1, len(ids))
                if words[at] != words[at - 1] or not known.joins(ids[at - 1], ids[at])
            ]
            stretches = itertools.pairwise([0, *borders, len(ids)])
            runs.update(tuple(ids[start:end]) for start, end in stretches if end - start > 1)
    return runs, max(1, tokens)


class _Pairs:
    """Neighbours in the runs, with their `counts` in the new and in the old text. The most frequent
    of the new text comes first; of equals the first by name, so that the same text gives the same
    pieces."""

    def __init__(self, names: dict[int, str], new: Counter[Run], old: Counter[Run]) -> None:
        self.counts: dict[Pair, list[int]] = {}
        self._names = names
        self._runs = [(list(run), new[run], old[run]) for run in new | old]
        self._runs_of: dict[Pair, set[int]] = {}
        for number in range(len(self._runs)):
            self._count(number, 1)
        self._heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self._heap)

    def pop(self) -> Pair | None:
        """The next pair; None where all that are left are rare. No pair comes twice."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            pair = entry[-1]
            count = self.counts[pair][0]
            if count < LEAST_COUNT:
                continue
            if -entry[0] == count:
                return pair
            # counts only fall, but for pairs with a new piece, and those are pushed when it is made
            heapq.heappush(self._heap, self._entry(pair))
        return None

    def join(self, pair: Pair, piece: int) -> None:
        """The pair becomes the piece wherever it stands."""
        made: set[Pair] = set()
        for number in self._runs_of.pop(pair):
            run = self._runs[number][0]
            self._count(number, -1)
            joined: list[int] = []
            for token in run:
                if joined and (joined[-1], token) == pair:
                    joined[-1] = piece
                else:
                    joined.append(token)
            run[:] = joined
            self._count(number, 1)
            made.update(one for one in itertools.pairwise(run) if piece in one)
        for one in made:
            heapq.heappush(self._heap, self._entry(one))

    def _count(self, number: int, sign: int) -> None:
        run, new_count, old_count = self._runs[number]
        for pair in itertools.pairwise(run):
            counts = self.counts.setdefault(pair, [0, 0])
            counts[0] += sign * new_count
            counts[1] += sign * old_count
            if sign > 0:
                self._runs_of.setdefault(pair, set()).add(number)

    def _entry(self, pair: Pair) -> tuple[int, str, str, Pair]:
        return (-self.counts[pair][0], self._names[pair[0]], self._names[pair[1]], pair)


def _with_backend(tokenizer: "PreTrainedTokenizerFast", backend: Any) -> "PreTrainedTokenizerFast":
    """The same special tokens, template and settings around another backend.

    Not the same class: one that belongs to a family would build its own backend when it is loaded.
    """
    from transformers import PreTrainedTokenizerFast

    special = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in special.items() if token is not None},
        # those of a chat template, say
        extra_special_tokens=list(getattr(tokenizer, "extra_special_tokens", None) or ()),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        # the default of some versions joins " ," into ",", which loses text
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = tokenizer.chat_template
    return made


def compare_fertility(
    before: "PreTrainedTokenizerFast", after: "PreTrainedTokenizerFast", texts: Sequence[bytes]
) -> dict[str, Any]:
    """What the new pieces of `after` do to texts: tokens per byte and per word before and after.

    Words are what white space parts. `joined_share`: of the old tokens, how many became part of a
    new piece. `changed_documents`: those whose bytes the tokenizer does not give back.
    """
    first = max(before.get_vocab().values()) + 1
    num_bytes, words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    report: dict[str, Any] = {"documents": len(texts), "bytes": num_bytes, "words": words}
    for name, tokenizer in (("before", before), ("after", after)):
        codec = TokenCodec(tokenizer)
        encoded = codec.encode_many(texts)
        tokens = sum(map(len, encoded))
        report[name] = {
            "tokens": tokens,
            "tokens_per_byte": tokens / num_bytes,
            "tokens_per_word": tokens / words if words else None,
            "changed_documents": sum(
                codec.decode(ids) != text for ids, text in zip(encoded, texts, strict=True)
            ),
        }
        unchanged = sum(int((ids < first).sum()) for ids in encoded)
    # what is no new piece is an old token as it was
    report["joined_share"] = 1 - unchanged / report["before"]["tokens"]
    return report
