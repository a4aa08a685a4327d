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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from capgap.corpus.tokenizer import GROUP_CHARACTERS, TokenCodec, grouped
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
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Extension:
    """A tokenizer with more pieces.

    Attributes:
        tokenizer: it encodes and decodes as the old one but for the new pieces.
        first: id of the first new piece; below it are the old ones.
        origins: of every new piece the old ids that it is made of.
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
    """Add up to `pieces` pieces that the new text has use for; a small text may give fewer.

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
    is_byte_level = TokenCodec(tokenizer).is_byte_level
    _check_kind(description["model"], is_byte_level=is_byte_level)
    known = _Pieces(description)
    if not is_byte_level:
        for character in _characters(tokenizer, known, new, pieces):
            known.add(character, [known.ids[f"<0x{byte:02X}>"] for byte in character.encode()])
    table = _Table(known, is_byte_level=is_byte_level)
    table.read(new, is_old=False)
    table.read(old, is_old=True)
    refused = _learn(table, known, pieces, old_share)
    if not known.origins:
        raise UserError("the new text has no use for new pieces: no pair of tokens is frequent")
    extended = _with_backend(tokenizer, Tokenizer.from_str(json.dumps(description)))
    return Extension(extended, known.first, tuple(known.origins), refused)


class _Pieces:
    """A tokenizer's description and its pieces, to which new ones are added.

    Attributes:
        ids: of the pieces by name; a part of the description.
        names: the other way round.
        first: id of the first new piece.
        origins: of every new piece the old ids that it is made of.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.ids: dict[str, int] = description["model"]["vocab"]
        # added tokens become entries, so that none is missing
        for token in description["added_tokens"]:
            self.ids.setdefault(token["content"], token["id"])
        self.names = {i: name for name, i in self.ids.items()}
        self.first = max(self.names) + 1
        self.origins: list[tuple[int, ...]] = []

    def add(self, name: str, parts: Sequence[int]) -> int:
        """Add a piece that stands for these, old or new ones; returns its id."""
        number = self.first + len(self.origins)
        self.ids[name] = number
        self.names[number] = name
        old = ((i,) if i < self.first else self.origins[i - self.first] for i in parts)
        self.origins.append(tuple(itertools.chain.from_iterable(old)))
        return number


def _check_kind(model: dict[str, Any], *, is_byte_level: bool) -> None:
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or affixes or not (is_byte_level or model.get("byte_fallback")):
        raise UserError(
            f"cannot extend this tokenizer ({model['type']}): it must be byte-level BPE, or BPE "
            "with byte fallback"
        )


def _characters(
    tokenizer: "PreTrainedTokenizerFast", known: _Pieces, new: Sequence[bytes], most: int
) -> list[str]:
    """The frequent characters that are no piece yet, by falling count."""
    counts: Counter[str] = Counter()
    normalizer: Any = tokenizer.backend_tokenizer.normalizer
    for document in new:
        text = document.decode("utf-8", "ignore")
        counts.update(text if normalizer is None else normalizer.normalize_str(text))
    # control characters stay bytes
    missing = [one for one in counts if one not in known.ids and one.isprintable()]
    left = (1 - CHARACTER_COVERAGE) * sum(counts.values())
    found = sorted(missing, key=lambda one: (-counts[one], one))
    while found and (counts[found[-1]] < LEAST_COUNT or counts[found[-1]] <= left):
        left -= counts[found.pop()]
    return found[:most]


class _Table:
    """Runs of tokens that merges may join, with their counts in the new and the old text."""

    def __init__(self, known: _Pieces, *, is_byte_level: bool) -> None:
        self.backend: Any = Tokenizer.from_str(json.dumps(known.description))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True
        self.names = known.names
        self.is_byte_level = is_byte_level
        self.alone = {token["id"] for token in known.description["added_tokens"]}
        self.alone.update(i for name, i in known.ids.items() if BYTE.fullmatch(name))
        self.counts: dict[tuple[int, ...], list[int]] = {}
        self.tokens = [0, 0]

    def read(self, documents: Sequence[bytes], *, is_old: bool) -> None:
        """Count the runs of documents; bytes that are not UTF-8 teach nothing."""
        texts = (document.decode("utf-8", "ignore") for document in documents)
        for group in grouped(texts, len, GROUP_CHARACTERS):
            for encoding in self.backend.encode_batch(group, add_special_tokens=False):
                self.tokens[is_old] += len(encoding.ids)
                for run in self._runs(encoding.ids, encoding.word_ids):
                    self.counts.setdefault(run, [0, 0])[is_old] += 1

    def _runs(self, ids: list[int], words: list[int | None]) -> Iterator[tuple[int, ...]]:
        """Neighbours of one word that may be joined, two or more."""
        borders = [
            place
            for place in range(1, len(ids))
            if words[place] != words[place - 1] or not self._joins(ids[place - 1], ids[place])
        ]
        for start, end in itertools.pairwise([0, *borders, len(ids)]):
            if end - start > 1:
                yield tuple(ids[start:end])

    def _joins(self, left: int, right: int) -> bool:
        """Whether two neighbours may become one piece.

        A byte-level tokenizer cuts text into words before; one with byte fallback does not, and its
        pieces are words of letters or marks with the spaces before them. A digit stays alone.
        """
        if left in self.alone or right in self.alone:
            return False
        if self.is_byte_level:
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


def _learn(table: _Table, known: _Pieces, pieces: int, old_share: float) -> int:
    """Adds pieces and merges until there are `pieces` new ones; returns how many were refused."""
    pairs = _Pairs(table)
    new_tokens, old_tokens = (max(1, tokens) for tokens in table.tokens)
    refused = 0
    while len(known.origins) < pieces and (pair := pairs.pop()) is not None:
        parts = [known.names[one] for one in pair]
        name = "".join(parts)
        new_count, old_count = pairs.counts[pair]
        # a piece that other merges already lead to would set those off again
        if name in known.ids:
            continue
        if old_count / old_tokens > old_share * new_count / new_tokens:
            refused += 1
            continue
        known.description["model"]["merges"].append(parts)
        pairs.join(pair, known.add(name, pair))
    return refused


class _Pairs:
    """Neighbours in the runs, the most frequent of the new text first; of equals the first by
    name, so that the same text gives the same pieces."""

    def __init__(self, table: _Table) -> None:
        self.names = table.names
        self.runs = [(list(run), counts) for run, counts in table.counts.items()]
        self.counts: dict[Pair, list[int]] = {}
        self.places: dict[Pair, set[int]] = {}
        for number in range(len(self.runs)):
            self._count(number, 1)
        self.heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

    def pop(self) -> Pair | None:
        """The next pair; None where all that are left are rare. No pair comes twice."""
        while self.heap:
            entry = heapq.heappop(self.heap)
            pair = entry[-1]
            count = self.counts[pair][0]
            if count < LEAST_COUNT:
                continue
            if -entry[0] == count:
                return pair
            # counts only fall, but for pairs with a new piece, and those are pushed when it is made
            heapq.heappush(self.heap, self._entry(pair))
        return None

    def join(self, pair: Pair, place: int) -> None:
        """The pair becomes the piece `place` wherever it stands."""
        made: set[Pair] = set()
        for number in sorted(self.places.pop(pair)):
            run, _ = self.runs[number]
            self._count(number, -1)
            joined: list[int] = []
            for token in run:
                if joined and (joined[-1], token) == pair:
                    joined[-1] = place
                else:
                    joined.append(token)
            run[:] = joined
            self._count(number, 1)
            made.update(one for one in itertools.pairwise(run) if place in one)
        for one in made:
            heapq.heappush(self.heap, self._entry(one))

    def _count(self, number: int, sign: int) -> None:
        run, (new_count, old_count) = self.runs[number]
        for pair in itertools.pairwise(run):
            counts = self.counts.setdefault(pair, [0, 0])
            counts[0] += sign * new_count
            counts[1] += sign * old_count
            if sign > 0:
                self.places.setdefault(pair, set()).add(number)

    def _entry(self, pair: Pair) -> tuple[int, str, str, Pair]:
        return (-self.counts[pair][0], self.names[pair[0]], self.names[pair[1]], pair)


def _with_backend(tokenizer: "PreTrainedTokenizerFast", backend: Any) -> "PreTrainedTokenizerFast":
    """The same special tokens, template and settings around another backend.

    Not the same class: one that belongs to a family would build its own backend when it is loaded.
    """
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in SPECIAL}
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
    told: dict[str, Any] = {"documents": len(texts), "bytes": num_bytes, "words": words}
    kept = 0
    for name, tokenizer in (("before", before), ("after", after)):
        codec = TokenCodec(tokenizer)
        encoded = codec.encode_many(texts)
        tokens = sum(map(len, encoded))
        told[name] = {
            "tokens": tokens,
            "tokens_per_byte": tokens / num_bytes,
            "tokens_per_word": tokens / words if words else None,
            "changed_documents": sum(
                codec.decode(ids) != text for ids, text in zip(encoded, texts, strict=True)
            ),
        }
        kept = sum(int((ids < first).sum()) for ids in encoded)
    # what is no new piece is an old token as it was
    told["joined_share"] = 1 - kept / told["before"]["tokens"]
    return told
