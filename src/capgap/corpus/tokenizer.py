"""Byte-level BPE: training, and exact passage between bytes and token ids for any tokenizer.

GPT-2's scheme: every byte is written as one printable character, text is cut into words and runs
of white space, and BPE merges characters within them.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from capgap.corpus.names import (
    HUB_NAME,
    OWN_CODE,
    at_revision,
    cached_file,
    hub_revision,
    looks_like_path,
)
from capgap.corpus.tokens import Marks
from capgap.errors import UserError, border, warn_once
from capgap.mirror import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte and the end of a document
LARGEST_VOCABULARY = 1 << 20
# Fewer bytes a token mean that a tokenizer of more tokens was made for other text (decisions.md)
STRANGE_BYTES_PER_TOKEN = 1.5
STRANGE_VOCABULARY = 1_000

# Text is handed over in pieces of about this size: they bound memory and are encoded in parallel.
PIECE_CHARACTERS = 1 << 16
GROUP_CHARACTERS = 1 << 22
# Between a letter and white space every common pre-tokenizer makes a cut.
PIECE_END = re.compile(r"[^\W\d_](?=[ \n])")
# What bytes that are not UTF-8 become under the error handler "surrogateescape".
INVALID_BYTES = re.compile("([\udc80-\udcff]+)")

# What a token for pictures or sound is called
_OTHER_MEDIA = re.compile("image|audio|video|vision")


class TokenCodec:
    """Bytes to token ids and back, with a tokenizer's settings read once.

    Special tokens that stand literally in a text are encoded as the text they are. With a
    byte-level tokenizer a byte that is not UTF-8 becomes the token of that byte, so every byte
    string comes back; any other tokenizer gets U+FFFD in its place.

    Attributes:
        is_byte_level: whether every byte string comes back.
        marks: the tokens that documents begin and end with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._backend = bare_backend(tokenizer.backend_tokenizer.to_str())
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        ids = {byte: self._backend.token_to_id(char) for char, byte in byte_of.items()}
        self._byte_ids = {byte: i for byte, i in ids.items() if i is not None}
        self._token_bytes = _token_bytes(self._backend, byte_of)
        self.marks = Marks.of(tokenizer)
        probe = "a\n b  c\u00e9\u4e2d\U0001f600 it's 12\n\n x "
        written = self._backend.encode(probe, add_special_tokens=False).ids
        comes_back = b"".join(self._token_bytes.get(i, b"") for i in written) == probe.encode()
        self.is_byte_level = comes_back and len(self._byte_ids) == 256
        self._cuts_at_white_space = self.is_byte_level and _cuts_at_white_space(self._backend)

    def encode(self, data: bytes) -> NDArray[np.int64]:
        """Token ids of the bytes, int64 [num_tokens]; without marks."""
        return self.encode_many([data])[0]

    def encode_many(self, documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        """Token ids of every document, each int64 [num_tokens]; runs on all cores."""
        parts = [list(self._parts(document)) for document in documents]
        texts = [part for own in parts for part in own if isinstance(part, str)]
        # the library's own results take some 100 bytes a token, so few are held at a time
        encoded = (
            np.array(encoding.ids, dtype=np.int64)
            for group in grouped(texts, len, GROUP_CHARACTERS)
            for encoding in self._backend.encode_batch_fast(group, add_special_tokens=False)
        )

        def ids(part: str | bytes) -> NDArray[np.int64]:
            if isinstance(part, str):
                return next(encoded)
            return np.array([self._byte_ids[byte] for byte in part], dtype=np.int64)

        none = np.empty(0, dtype=np.int64)
        return [np.concatenate([none, *map(ids, own)]) for own in parts]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that the token ids stand for; special tokens stand for none."""
        if self.is_byte_level:
            return b"".join(self._token_bytes[int(i)] for i in ids)
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.encode()

    def _parts(self, document: bytes) -> Iterator[str | bytes]:
        """Pieces of text, and the runs of invalid bytes between them."""
        text = document.decode("utf-8", "surrogateescape")
        if not self.is_byte_level:
            yield INVALID_BYTES.sub(lambda match: "\ufffd" * len(match[0]), text)
            return
        for number, part in enumerate(INVALID_BYTES.split(text)):
            if number % 2:
                yield part.encode("utf-8", "surrogateescape")
            else:
                yield from self._pieces(part)

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self._cuts_at_white_space and len(text) - start > PIECE_CHARACTERS:
            end = PIECE_END.search(text, start + PIECE_CHARACTERS)
            if end is None:
                break
            yield text[start : end.end()]
            start = end.end()
        yield text[start:]


def bare_backend(description: str) -> Any:
    """A tokenizer's backend from its JSON, without padding, truncation and special tokens."""
    backend: Any = Tokenizer.from_str(description)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def grouped(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in a row, as few at a time as have `limit` in all."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def train_tokenizer(documents: Iterable[bytes], vocabulary: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer; the same documents give the same tokenizer.

    Args:
        documents: the text; bytes that are not UTF-8 teach nothing.
        vocabulary: tokens wanted, with the 256 bytes and the end-of-document token (id 0, which
            also begins and pads). A small text may give fewer.

    Raises:
        UserError: the vocabulary cannot hold every byte.
    """
    from transformers import PreTrainedTokenizerFast

    check_vocabulary(vocabulary)
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (document.decode("utf-8", "ignore") for document in documents)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_DOCUMENT,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        # The default of some versions joins " ," into ",", which loses text.
        clean_up_tokenization_spaces=False,
    )


def check_vocabulary(vocabulary: int) -> None:
    """UserError for fewer tokens than hold every byte, or for too many to learn."""
    if not SMALLEST_VOCABULARY <= vocabulary <= LARGEST_VOCABULARY:
        fault = "small" if vocabulary < SMALLEST_VOCABULARY else "large"
        raise UserError(
            f"vocabulary {vocabulary} is too {fault}: {SMALLEST_VOCABULARY} tokens hold every byte "
            f"and the end of a document, and at most {LARGEST_VOCABULARY} are learnt"
        )


def load_tokenizer(
    path_or_name: str | Path, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a model folder or of a model on the Hugging Face hub; only with
    `trust_remote_code` may its own code be run.

    Raises:
        UserError: nothing there, not a fast tokenizer, or no end-of-document (eos) token.
    """
    from transformers import AutoTokenizer

    name = local(path_or_name, light=True)
    is_here = Path(name).exists() or cached_file(name, "tokenizer.json") is not None
    if not is_here:
        if looks_like_path(str(path_or_name)) or not HUB_NAME.fullmatch(name):
            raise UserError(f"no such tokenizer folder: {name}")
        # Without a network the loader below would retry for most of a minute.
        hub_revision(name, kind="model")
    if Path(name).is_dir():
        _check_files(Path(name))
    with border(f"cannot read the tokenizer of {name}"):
        try:
            # said here, since transformers would ask the terminal whether to run what it finds
            repository, revision = at_revision(name)
            tokenizer = AutoTokenizer.from_pretrained(
                repository,
                revision=revision or "main",
                local_files_only=is_here,
                trust_remote_code=trust_remote_code,
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"the tokenizer of {name} needs its own code (auto_map): save it as a fast "
                f"tokenizer (tokenizer.json); {OWN_CODE}"
            ) from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} has no tokenizer.json; convert it to a fast one")
    if len(tokenizer) < 2:
        raise UserError(f"the tokenizer of {name} has no tokens: give the model's own")
    with border(f"the tokenizer of {name} does not work"):
        Marks.of(tokenizer)  # refuses one without an end of text
    return tokenizer


def _check_files(folder: Path) -> None:
    """UserError where transformers would make up an empty tokenizer, or ask for another library
    than the one that helps."""
    if (folder / "tokenizer.json").is_file():
        return
    pieces = sorted(folder.glob("*.model"))
    if pieces and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{pieces[0]} is a sentencepiece model and needs that library: pip install "
            "sentencepiece protobuf, or save the tokenizer as tokenizer.json"
        )
    if not pieces and not any(folder.glob("vocab*")) and not any(folder.glob("*.tiktoken")):
        raise UserError(f"no tokenizer in {folder} (no tokenizer.json): give one that has it")


def num_words(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest token id that text can hold.

    Tokens for pictures and sound stand in none: a text model of a family that also sees has no rows
    for those at the end (Gemma 3 1B).
    """
    last = max(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder
    while last in added and added[last].special and _OTHER_MEDIA.search(added[last].content):
        last -= 1
    return last + 1


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """sha256 of what decides a text's token ids: vocabulary, merges, cutting, specials, marks."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # Not the post-processor: saving and loading writes an empty one where there was none. What it
    # puts first is among the marks.
    identity = {key: description[key] for key in ("model", "normalizer", "pre_tokenizer")}
    identity["added_tokens"] = [[t["id"], t["content"]] for t in description["added_tokens"]]
    identity["marks"] = asdict(Marks.of(tokenizer))
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_text(text: str, what: str) -> None:
    """UserError for text that no tokenizer reads: bytes that were not UTF-8, half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!a} at character {error.start}, which is no whole "
            "character: give it as UTF-8"
        ) from None


def warn_of_strange_text(name: str, num_bytes: int, num_tokens: int, vocabulary: int) -> None:
    """Tells where a tokenizer knows little of the text of this name; tokens without marks."""
    rate = num_bytes / max(1, num_tokens)
    if vocabulary > STRANGE_VOCABULARY and rate < STRANGE_BYTES_PER_TOKEN:
        warn_once(
            f"the tokenizer has few tokens for the text of {name!r}, {rate:.2f} bytes a token: is "
            "it another language, or no text?"
        )


def count_invalid_bytes(data: bytes) -> int:
    """How many bytes are no part of valid UTF-8."""
    return 0 if data.isascii() else len(data) - len(data.decode("utf-8", "ignore").encode())


def compare_tokenizers(
    first: "PreTrainedTokenizerFast", second: "PreTrainedTokenizerFast"
) -> str | None:
    """The lowest token id that means different things, in words, or None if all are equal."""
    tables = [
        {i: repr(token) for token, i in tokenizer.get_vocab().items()}
        for tokenizer in (first, second)
    ]
    for i in sorted(tables[0].keys() | tables[1].keys()):
        mine, other = (table.get(i, "missing") for table in tables)
        if mine != other:
            sizes = " and ".join(str(len(table)) for table in tables)
            return f"token {i} is {mine} in one and {other} in the other ({sizes} tokens)"
    return None


def _token_bytes(backend: Any, byte_of: dict[str, int]) -> dict[int, bytes]:
    """Bytes of every token, read as byte-level (`byte_of`: by character); a token that cannot be
    read so is left out."""
    added = backend.get_added_tokens_decoder()
    token_bytes = {}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i in added:
            # added tokens are written as plain text, and only those that are not special are text
            token_bytes[i] = b"" if added[i].special else token.encode()
        elif byte_of.keys() >= set(token):
            token_bytes[i] = bytes(byte_of[character] for character in token)
    return token_bytes


def _cuts_at_white_space(backend: Any) -> bool:
    """Whether a text may be cut between a letter and white space without changing its tokens."""
    if backend.pre_tokenizer is None:
        return False
    probe = "ab cd\nef  gh\n\nij"
    starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(probe)}
    return all(match.end() in starts for match in PIECE_END.finditer(probe))
