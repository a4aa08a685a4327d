import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from capgap.corpus import tokenizer as subject
from capgap.corpus.tokenizer import (
    END_OF_DOCUMENT,
    TokenCodec,
    compare_tokenizers,
    count_invalid_bytes,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from capgap.errors import UserError


def encode_bytes(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    return TokenCodec(tokenizer).encode(data).tolist()


def decode_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    return TokenCodec(tokenizer).decode(ids)


TEXT = (
    "  Indented, twice  spaced , and don't \"quoted\" .\n\n\n\tTabbed line; it's 1999-12-31!\r\n"
    "def f(x):\n    return x ** 2  # "
    "caf\u00e9 na\u00efve \u4e2d\u6587\u3002 \U0001f600\u200d\U0001f525 \u00b2"
    " \u0300e\n"
    "a<|endoftext|>b \u00a0 \u2003 end of words \n \n"
)
# The cutting of Llama 3 and its kin: punctuation takes newlines along, digits go by three.
LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT.encode() * 3, b"the words of the words " * 20], 380)


@pytest.fixture(scope="module")
def llama3_like() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    trainer.show_progress = False
    backend.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def not_byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], initial_alphabet=["\ufffd"]
    )
    trainer.show_progress = False
    backend.train_from_iterator(["some words and some more words"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_every_byte_string_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    random = np.random.default_rng(0)
    cases = [bytes([byte]) for byte in range(256)]
    cases += [random.bytes(int(size)) for size in random.integers(0, 200, 100)]
    cases += [b"", TEXT.encode(), TEXT.encode("utf-16"), b"caf\xe9 \xff\xfe tail", b"\xed\xa0\x80"]
    codec = TokenCodec(tokenizer)
    for data, ids in zip(cases, codec.encode_many(cases), strict=True):
        assert codec.decode(ids) == data
    assert decode_bytes(tokenizer, encode_bytes(tokenizer, b"x\xffy")) == b"x\xffy"


def test_valid_text_is_encoded_as_the_library_does(tokenizer: PreTrainedTokenizerFast) -> None:
    text = TEXT.replace(END_OF_DOCUMENT, "")
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_bytes(tokenizer, text.encode()) == expected
    assert [ids.tolist() for ids in TokenCodec(tokenizer).encode_many([text.encode(), b""])] == [
        expected,
        [],
    ]


def test_special_token_in_the_text_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_bytes(tokenizer, b"a<|endoftext|>b")
    assert tokenizer.eos_token_id == 0
    assert 0 not in ids
    assert decode_bytes(tokenizer, ids) == b"a<|endoftext|>b"
    assert decode_bytes(tokenizer, [0]) == b""
    # The caller's own object keeps its habits.
    assert 0 in tokenizer("a<|endoftext|>b")["input_ids"]


def test_callers_padding_and_truncation_do_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = encode_bytes(tokenizer, TEXT.encode())
    used = copy.deepcopy(tokenizer)
    used([TEXT, "x"], padding=True, truncation=True, max_length=5)
    assert encode_bytes(used, TEXT.encode()) == expected


@pytest.mark.parametrize("kind", ["tokenizer", "llama3_like"])
def test_pieces_give_the_tokens_of_the_whole(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = request.getfixturevalue(kind)
    text = TEXT * 4 + "words.\n\nNew 12345 'll  x" * 10
    backend = Tokenizer.from_str(given.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    whole = backend.encode(text, add_special_tokens=False).ids
    for size in (1, 2, 3, 5, 8, 50):
        monkeypatch.setattr(subject, "PIECE_CHARACTERS", size)
        monkeypatch.setattr(subject, "GROUP_CHARACTERS", 3 * size)
        codec = TokenCodec(given)
        assert len(list(codec._parts(text.encode()))) > 10
        assert codec.encode(text.encode()).tolist() == whole


def test_no_pieces_where_they_would_change_tokens(
    not_byte_level: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "PIECE_CHARACTERS", 4)
    text = "some more words and some words"
    expected = not_byte_level(text, add_special_tokens=False)["input_ids"]
    assert encode_bytes(not_byte_level, text.encode()) == expected


def test_tokenizer_that_is_not_byte_level(not_byte_level: PreTrainedTokenizerFast) -> None:
    codec = TokenCodec(not_byte_level)
    assert not codec.is_byte_level
    assert codec.decode(codec.encode(b"some more words")) == b"some more words"
    assert codec.encode(b"some\xff\xfewords").tolist() == encode_bytes(
        not_byte_level, "some\ufffd\ufffdwords".encode()
    )


def test_saved_tokenizer_gives_back_all_valid_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    for loaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)):
        for text in (TEXT, "  lead", "trail  ", "a , b . c ! don 't", "\n\n", " \t\r\n", "I 'm"):
            assert loaded.decode(loaded(text)["input_ids"]) == text
            assert encode_bytes(loaded, text.encode()) == encode_bytes(tokenizer, text.encode())
        assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 0)
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert compare_tokenizers(tokenizer, loaded) is None


def test_vocabulary_is_as_asked_and_has_every_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 380
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert len(train_tokenizer([b"ab"], 1000)) == 257
    with pytest.raises(UserError, match="vocabulary 256 is too small"):
        train_tokenizer([b"ab"], 256)


def test_training_is_the_same_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    script = (
        "import sys; from capgap.corpus.tokenizer import *\n"
        "text = sys.stdin.buffer.read()\n"
        "t = train_tokenizer([text * 3, b'the words of the words ' * 20], 380)\n"
        "print(tokenizer_hash(t))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], input=TEXT.encode(), capture_output=True, check=True
    )
    assert run.stdout.decode().strip() == tokenizer_hash(tokenizer)


def test_every_token_has_bytes_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = TokenCodec(tokenizer)
    assert codec.decode([0]) == b""
    pieces = [codec.decode([i]) for i in codec.encode(TEXT.encode())]
    assert b"".join(pieces) == TEXT.encode()
    assert all(codec.decode([i]) for i in range(1, 380))


def test_added_tokens_that_are_text_count_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["na\u00efve    "])
    longer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_DOCUMENT)
    data = "so na\u00efve    x".encode()
    ids = encode_bytes(longer, data)
    assert 380 in ids
    assert decode_bytes(longer, ids) == data
    assert tokenizer_hash(longer) != tokenizer_hash(tokenizer)
    assert compare_tokenizers(tokenizer, longer) == (
        "token 380 is missing in one and 'na\u00efve    ' in the other (380 and 381 tokens)"
    )


def test_first_difference_of_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_tokenizer([b"quite other words " * 30], 380)
    difference = compare_tokenizers(tokenizer, other)
    assert difference is not None
    # 0 is the end of a document and 1 to 256 are the bytes, in both.
    number = int(difference.split()[1])
    assert number >= 257
    assert repr(tokenizer.convert_ids_to_tokens(number)) in difference


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 0),
        ("caf\u00e9 \U0001f600".encode(), 0),
        (b"\xff\xfe", 2),
        (b"caf\xe9 ", 1),
        (b"\xed\xa0\x80", 3),  # a lone surrogate
        ("\U0001f600".encode()[:3], 3),  # a character cut short
        (b"\xc0\x80", 2),  # an overlong zero
    ],
)
def test_invalid_bytes_are_counted(data: bytes, count: int) -> None:
    assert count_invalid_bytes(data) == count
    # The decoder that keeps the place of every error agrees.
    assert len(data.decode("utf-8", "ignore").encode()) == len(data) - count


def test_missing_tokenizers_are_told_from_hub_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="no such tokenizer folder"):
        load_tokenizer("a name with spaces")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "empty")


def test_importing_the_corpus_modules_is_cheap() -> None:
    script = (
        "import sys, capgap.corpus.prepare, capgap.corpus.text\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
