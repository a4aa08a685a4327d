import errno
import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.artifact import read_json, write_json
from capgap.corpus import chunks, tokens
from capgap.corpus import prepare as module
from capgap.corpus.excerpt import cut_text, fair_limit
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.text import Text
from capgap.corpus.tokenizer import TokenCodec, train_tokenizer
from capgap.corpus.tokens import Corpus, Marks, TokenWindows, load_corpus
from capgap.errors import UserError
from capgap.sweep.checks import check_epochs

WORDS = ["the", "of", "and", "a", "to", "in", "he", "was", "that", "his", "with", "had", "not"]


def make_document(number: int, *, words: int = 60) -> bytes:
    random = np.random.default_rng(number)
    text = " ".join(random.choice(WORDS, words))
    return f"Story {number}. {text}\n".encode()


def write_documents(path: Path, documents: list[bytes]) -> None:
    path.write_bytes(b"<|endoftext|>\n".join(documents))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    write_documents(path, [make_document(number) for number in range(200)])
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([make_document(number) for number in range(20)], 300)


def prepare(source: Path | str, directory: Path, **options: Any) -> Corpus:
    return prepare_corpus(str(source), directory, **({"vocabulary": 300, "window": 16} | options))


def train_text(corpus: Corpus) -> list[bytes]:
    """The training documents, read back from the shards."""
    ids = np.concatenate(
        [
            np.fromfile(corpus.directory / shard["name"], dtype=corpus.manifest["dtype"])
            for shard in corpus.manifest["train"]["shards"]
        ]
    )
    ends = np.flatnonzero(ids == corpus.marks.end)
    assert ends[0] == 0
    return [
        TokenCodec(corpus.tokenizer).decode(ids[start + 1 : end])
        for start, end in itertools.pairwise(ends)
    ]


def heldout_text(corpus: Corpus) -> list[bytes]:
    return [TokenCodec(corpus.tokenizer).decode(d.tokens) for d in corpus.heldout_documents()]


def test_every_document_is_in_one_part_and_comes_back(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "corpus", heldout_fraction=0.1)
    train, heldout = train_text(corpus), heldout_text(corpus)
    assert sorted(train + heldout) == sorted(make_document(number) for number in range(200))
    assert train == sorted(train, key=lambda text: int(text.split()[1][:-1]))
    assert 8 <= len(heldout) <= 35
    counts = corpus.manifest
    assert counts["train"]["documents"] == len(train)
    assert counts["train"]["bytes"] == sum(map(len, train))
    assert counts["heldout"]["bytes"] == sum(map(len, heldout))
    assert counts["train"]["tokens"] == corpus.train_tokens == corpus.train.num_tokens


def test_heldout_documents_have_context_and_exact_bytes(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "corpus", heldout_fraction=0.1)
    for document in corpus.heldout_documents():
        assert document.tokens.dtype == np.int64
        text = TokenCodec(corpus.tokenizer).decode(document.tokens)
        assert len(text) == document.num_bytes
        end = corpus.marks.end
        assert document.tokens.tolist() == [end, *TokenCodec(corpus.tokenizer).encode(text), end]


def test_heldout_limit_is_shared_fairly(source: Path, tmp_path: Path) -> None:
    for number, limit in enumerate((40, 700, 1500)):
        corpus = prepare(source, tmp_path / str(number), heldout_fraction=0.5, heldout_tokens=limit)
        documents = corpus.heldout_documents()
        total = sum(len(document.tokens) - 1 for document in documents)
        assert 0.8 * limit <= total <= limit
        assert corpus.manifest["heldout"]["tokens"] == total
        lengths = [len(document.tokens) - 1 for document in documents]
        # Cut ones have the same length but for the way to the last white space.
        assert max(lengths) - sorted(lengths)[len(lengths) // 2] < 15
        assert corpus.manifest["heldout"]["documents"] > 60
        for document in documents:
            text = TokenCodec(corpus.tokenizer).decode(document.tokens)
            assert len(text) == document.num_bytes
            assert any(make_document(i).startswith(text) for i in range(200))


def test_long_heldout_documents_give_a_part_each(tmp_path: Path) -> None:
    documents = [make_document(number, words=1500) for number in range(40)]
    write_documents(tmp_path / "a.txt", documents)
    options = {"heldout_fraction": 0.5, "heldout_tokens": 3000}
    corpus = prepare(tmp_path / "a.txt", tmp_path / "corpus", **options)
    lengths = [len(document.tokens) - 1 for document in corpus.heldout_documents()]
    assert len(lengths) == 6  # 3000 / 512, upwards
    assert 490 <= min(lengths) <= max(lengths) <= 500


def test_fair_limit() -> None:
    assert fair_limit([10, 20, 30], 60) == 30
    assert fair_limit([10, 20, 30], 45) == 17
    assert fair_limit([5], 3) == 3


def test_text_is_cut_at_white_space_or_between_characters() -> None:
    assert cut_text(b"some words here", 12) == b"some words"
    assert cut_text(b"some words", 10) == b"some words"
    assert cut_text("\u4e2d\u6587".encode(), 5) == "\u4e2d".encode()
    assert cut_text(b"\n\n\n", 0) == b""


def test_adding_documents_moves_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [make_document(number) for number in range(100)]
    more = [make_document(1000 + number) for number in range(100)]
    write_documents(tmp_path / "a.txt", documents)
    write_documents(tmp_path / "b.txt", more[::-1] + documents[::-1])
    options = {"tokenizer": tokenizer, "heldout_fraction": 0.2}
    before = prepare(tmp_path / "a.txt", tmp_path / "a", **options)
    after = prepare(tmp_path / "b.txt", tmp_path / "b", **options)
    assert set(heldout_text(before)) == set(heldout_text(after)) & set(documents)
    assert set(train_text(before)) == set(train_text(after)) & set(documents)


def test_duplicates_and_invalid_bytes_are_counted(tmp_path: Path) -> None:
    documents = [make_document(number) for number in range(50)]
    bad = [b"caf\xe9 " * 10 + b"\n", b"\xff\xfe" * 5 + b"\n"]
    write_documents(tmp_path / "a.txt", [*documents, *bad, *documents[:7]])
    corpus = prepare(tmp_path / "a.txt", tmp_path / "corpus", heldout_fraction=0.1)
    manifest = corpus.manifest
    assert manifest["documents"] == {"read": 59, "duplicates": 7, "in_heldout_source": 0}
    assert manifest["train"]["invalid_bytes"] + manifest["heldout"]["invalid_bytes"] == 20
    assert manifest["invalid_bytes_kept"]
    assert sorted(train_text(corpus) + heldout_text(corpus)) == sorted(documents + bad)


@pytest.mark.parametrize(("number", "heldout"), [(19, 1), (45, 4), (200, 8)])
def test_few_documents_still_give_several_to_evaluate(
    tmp_path: Path, number: int, heldout: int
) -> None:
    write_documents(tmp_path / "a.txt", [make_document(i) for i in range(number)])
    corpus = prepare(tmp_path / "a.txt", tmp_path / "corpus", heldout_fraction=1e-9)
    assert len(heldout_text(corpus)) == heldout
    assert len(train_text(corpus)) == number - heldout


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_part_of_a_tiny_corpus_is_empty(tmp_path: Path, fraction: float) -> None:
    write_documents(tmp_path / "a.txt", [make_document(number) for number in range(5)])
    corpus = prepare(tmp_path / "a.txt", tmp_path / "corpus", heldout_fraction=fraction)
    parts = (len(train_text(corpus)), len(heldout_text(corpus)))
    assert parts == ((4, 1) if fraction < 0.5 else (1, 4))


def test_windows_cover_the_stream_with_one_token_shared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(source, tmp_path / "whole")
    # So small that a window reaches over several shards.
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 7)
    parts = prepare(source, tmp_path / "parts", max_train_tokens=2000)
    assert len(parts.manifest["train"]["shards"]) > 100
    for corpus in (whole, parts):
        stream = np.concatenate(
            [
                np.fromfile(corpus.directory / shard["name"], dtype="<u2")
                for shard in corpus.manifest["train"]["shards"]
            ]
        )
        assert corpus.windows == len(corpus.train) == (len(stream) - 1) // 16
        windows = corpus.train.windows_at(np.arange(corpus.windows))
        assert windows.dtype == np.int64
        np.testing.assert_array_equal(windows[:, :-1].ravel(), stream[: corpus.windows * 16])
        np.testing.assert_array_equal(windows[:, 1:].ravel(), stream[1 : corpus.windows * 16 + 1])
        np.testing.assert_array_equal(corpus.train.windows_at([5])[0], windows[5])
        np.testing.assert_array_equal(corpus.train.windows_at([9, 0, 9]), windows[[9, 0, 9]])
        for wrong in (-1, corpus.windows):
            with pytest.raises(IndexError):
                corpus.train.windows_at([wrong])


def test_shards_have_their_hashes_and_are_cut_in_files_without_effect(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(source, tmp_path / "whole")
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 1000)
    parts = prepare(source, tmp_path / "parts")
    for corpus in (whole, parts):
        for shard in corpus.manifest["train"]["shards"]:
            data = (corpus.directory / shard["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            assert len(data) == 2 * shard["tokens"]
    assert len(parts.manifest["train"]["shards"]) > len(whole.manifest["train"]["shards"]) == 1
    assert parts.corpus_hash == whole.corpus_hash


def test_large_vocabularies_take_four_bytes(tmp_path: Path, source: Path) -> None:
    vocabulary = {"</s>": 70_000, "[unk]": 0} | {word: 69_000 + i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wide = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[unk]")
    corpus = prepare(source, tmp_path / "corpus", tokenizer=wide)
    assert corpus.manifest["dtype"] == "<u4"
    assert corpus.vocabulary == 70_001
    assert not corpus.manifest["invalid_bytes_kept"]
    assert corpus.train.windows_at([0])[0, 0] == 70_000
    assert corpus.train.windows_at([0]).max() == 70_000


def test_limits_of_bytes_and_tokens(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "bytes", max_bytes=5000)
    counts = corpus.manifest
    taken = counts["train"]["bytes"] + counts["heldout"]["bytes"]
    assert 5000 - 500 < taken <= 5000
    assert train_text(corpus)[0] in (make_document(0), make_document(1))

    corpus = prepare(source, tmp_path / "tokens", max_train_tokens=1000)
    counts = corpus.manifest
    assert 950 <= corpus.train_tokens <= 1000
    stream = np.fromfile(corpus.directory / "train-00000.bin", dtype="<u2")
    # The counted bytes are just those the tokens stand for.
    assert len(TokenCodec(corpus.tokenizer).decode(stream)) == counts["train"]["bytes"]
    everything = sum(counts[part]["bytes"] for part in ("train", "heldout", "unused"))
    assert everything == sum(len(make_document(number)) for number in range(200))


def test_a_limit_of_documents_counts_only_where_it_is_given(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "few", max_documents=20)
    taken = [make_document(number) for number in range(20)]
    assert sorted(train_text(corpus) + heldout_text(corpus)) == sorted(taken)
    first = prepare(source, tmp_path / "all").corpus_hash
    with pytest.raises(UserError, match="max_documents is 20, was not given"):
        prepare(source, tmp_path / "all", max_documents=20)
    # as it was made before there was such a limit
    manifest = read_json(tmp_path / "all" / "manifest.json")
    del manifest["request"]["options"]["max_documents"]
    write_json(tmp_path / "all" / "manifest.json", manifest)
    made = (tmp_path / "all" / "manifest.json").stat().st_mtime_ns
    assert prepare(source, tmp_path / "all").corpus_hash == first
    assert (tmp_path / "all" / "manifest.json").stat().st_mtime_ns == made
    # of every source as many
    write_documents(tmp_path / "held.txt", [make_document(number) for number in range(900, 910)])
    both = prepare(
        source, tmp_path / "both", heldout_source=str(tmp_path / "held.txt"), max_documents=4
    )
    assert train_text(both) == taken[:4]
    assert len(heldout_text(both)) == 4


def test_files_that_are_not_parted(typed, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(source.read_bytes() + b"%d" % number)
    asked = ("--out", tmp_path / "corpus", "--vocabulary", "300", "--separator", "")
    done = typed("corpus", folder, *asked)
    assert done.code == 0, done.err
    assert read_json(tmp_path / "corpus" / "manifest.json")["documents"]["read"] == 3
    alone = typed("corpus", source, "--out", tmp_path / "alone", "--separator", "")
    assert alone.code == 2
    assert "is one document" in alone.err
    assert "part it by lines '<|endoftext|>'" in alone.err


def test_a_text_that_the_tokenizer_knows_little_of_is_warned_of(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # made-up words, enough of them for a vocabulary above 1,000
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnop"), 6)) for _ in range(600)]
    known = [" ".join(random.choice(words, 300)).encode() for _ in range(40)]
    large, small = train_tokenizer(known, 1500), train_tokenizer(known, 500)
    write_documents(tmp_path / "known.txt", known)
    cyrillic = " ".join(map(chr, range(0x430, 0x450)))
    strange = [f"{cyrillic} {number}\n".encode() * 20 for number in range(40)]
    write_documents(tmp_path / "strange.txt", strange)
    prepare(tmp_path / "known.txt", tmp_path / "a", tokenizer=large)
    prepare(tmp_path / "strange.txt", tmp_path / "b", tokenizer=small)
    prepare(tmp_path / "strange.txt", tmp_path / "c", vocabulary=1500)
    assert not [line for line in caplog.messages if "bytes a token" in line]
    corpus = prepare(tmp_path / "strange.txt", tmp_path / "d", tokenizer=large)
    (line,) = [line for line in caplog.messages if "bytes a token" in line]
    counts = corpus.manifest["train"]
    rate = counts["bytes"] / (counts["tokens"] - counts["documents"])
    assert f"{tmp_path}/strange.txt', {rate:.2f} bytes a token" in line
    assert rate == pytest.approx(1, abs=0.05)


def test_heldout_text_of_its_own(source: Path, tmp_path: Path) -> None:
    other = [make_document(3), make_document(5000), make_document(5001)]
    write_documents(tmp_path / "other.txt", other)
    corpus = prepare(source, tmp_path / "corpus", heldout_source=str(tmp_path / "other.txt"))
    assert sorted(heldout_text(corpus)) == sorted(other)
    expected = [make_document(number) for number in range(200) if number != 3]
    assert train_text(corpus) == expected
    assert corpus.manifest["documents"]["in_heldout_source"] == 1
    with pytest.raises(UserError, match="nothing but documents of the held-out source"):
        prepare(source, tmp_path / "again", heldout_source=str(source))


def test_a_source_that_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(make_document(1, words=2000))
    with pytest.raises(UserError, match=r"is one document.*separator"):
        prepare(tmp_path / "a.txt", tmp_path / "corpus")
    write_documents(tmp_path / "b.txt", [make_document(2)])
    corpus = prepare(tmp_path / "a.txt", tmp_path / "c", heldout_source=str(tmp_path / "b.txt"))
    assert corpus.manifest["train"]["documents"] == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\n<|endoftext|>\n \n", "is empty"),
        (b"a\n<|endoftext|>\nb", "do not fill one window of 16"),
    ],
)
def test_too_little_text(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "a.txt", tmp_path / "corpus")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"heldout_tokens": 0},
        {"max_bytes": 0},
        {"max_documents": 0},
        {"max_train_tokens": -1},
        {"vocabulary": 100},
    ],
)
def test_impossible_options(source: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        prepare(source, tmp_path / "corpus", **wrong)
    assert not (tmp_path / "corpus").exists()


def test_reuse_and_its_end(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="capgap")
    directory = tmp_path / "corpus"
    stages: list[str] = []

    def note(stage: str, done: int, total: int | None) -> None:
        assert total is None or 0 < done <= total
        stages.append(stage)

    def again(**options: Any) -> str:
        """Prepare once more; the reason given for doing so, or nothing for reuse."""
        caplog.clear()
        stages.clear()
        prepare(source, directory, progress=note, **options)
        assert bool(stages) == bool(caplog.messages)
        return "".join(caplog.messages)

    assert again().endswith("it is new")
    assert set(stages) == {"read", "tokenize"}
    first = load_corpus(directory, window=16).corpus_hash
    assert again() == ""
    assert again(window=8) == ""
    assert again(vocabulary=310, replace=True).endswith("vocabulary is 310, was 300")
    assert again(vocabulary=310, max_bytes=9000, replace=True).endswith(
        "max_bytes is 9000, was not given"
    )
    assert again(replace=True).endswith("vocabulary is 300, was 310")

    shard = directory / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"damaged: train-00000\.bin"):
        load_corpus(directory, window=16)
    assert "damaged: train-00000.bin" in again()
    shutil.rmtree(directory / "tokenizer")
    assert "tokenizer is missing" in again()
    assert load_corpus(directory, window=16).corpus_hash == first

    # Only the time differs: noticed, and prepared to the same content.
    os.utime(source, ns=(1, 1))
    assert again().endswith(f"the source changed: {source}")
    assert load_corpus(directory, window=16).corpus_hash == first
    write_documents(source, [make_document(number) for number in range(1, 201)])
    assert again().endswith(f"the source changed: {source}")
    assert load_corpus(directory, window=16).corpus_hash != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "text.txt"]


def test_the_corpus_of_another_request_is_refused_and_stays(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = prepare(source, tmp_path / "corpus").corpus_hash
    shutil.copy(source, tmp_path / "other.txt")
    for options, told in (
        ({"vocabulary": 310}, "vocabulary is 310, was 300"),
        ({"max_bytes": 9000}, "max_bytes is 9000, was not given"),
        ({"begin_windows": True}, "begin_windows is true, was false"),
        ({"tokenizer": tokenizer}, "vocabulary is not given, was 300"),
        ({"separator": "---"}, "source.separator is ---, was <|endoftext|>"),
        ({"text_column": "body"}, "source.text_column is body, was text"),
        ({"source": tmp_path / "other.txt"}, f"source.name is {tmp_path}/other.txt, was "),
        (
            {"heldout_source": str(source)},
            f"heldout_source.name is {source}, was not given",
        ),
    ):
        with pytest.raises(UserError) as caught:
            prepare(**({"source": source, "directory": tmp_path / "corpus"} | options))
        line = str(caught.value)
        assert f"{tmp_path}/corpus holds another corpus ({told}" in line
        assert line.endswith("): choose another output folder, or delete this one")
    assert load_corpus(tmp_path / "corpus", window=16).corpus_hash == before
    # the same file in another spelling is the same request
    spelled = f"{tmp_path}/./{source.name}"
    assert prepare(spelled, tmp_path / "corpus").corpus_hash == before


@pytest.mark.parametrize("name", ["train-00000.bin", "heldout.bin"])
def test_a_flipped_bit_is_noticed_at_first_use_and_mended(
    source: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = prepare(source, tmp_path / "corpus")
    text = Text.of([corpus])
    assert len(text.train) == corpus.windows
    path = tmp_path / "corpus" / name
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    damaged = Text.open([(tmp_path / "corpus", None)], 16)
    with pytest.raises(UserError) as caught:
        _ = damaged.heldout_documents() if name == "heldout.bin" else damaged.train
    told = f"the corpus in {tmp_path}/corpus is damaged: {name} does not hold what was written"
    assert str(caught.value).startswith(told)
    assert "prepare it again" in str(caught.value)
    again = prepare(source, tmp_path / "corpus")
    assert f"anew: it is damaged: {name} does not hold" in caplog.text
    assert again.corpus_hash == corpus.corpus_hash
    assert len(again.train) == corpus.windows
    assert len(again.heldout_documents()) == len(heldout_text(corpus))


def test_files_are_read_for_their_hash_once_a_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path / "corpus")
    hashed: list[str] = []
    digest = hashlib.file_digest

    def spy(stream: Any, name: str) -> Any:
        hashed.append(Path(stream.name).name)
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    for _ in range(3):
        corpus = load_corpus(tmp_path / "corpus", window=16)
        assert len(corpus.train) == corpus.windows
        corpus.heldout_documents()
    assert hashed == ["train-00000.bin", "heldout.bin"]


def test_source_that_changes_while_it_is_read(source: Path, tmp_path: Path) -> None:
    def change(stage: str, done: int, total: int | None) -> None:
        if stage == "read":
            write_documents(source, [make_document(done + number) for number in range(200)])

    with pytest.raises(UserError, match="changed while it was read"):
        prepare(source, tmp_path / "corpus", progress=change)
    assert not (tmp_path / "corpus").exists()


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no corpus"):
        prepare(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    with pytest.raises(UserError, match="no prepared corpus"):
        load_corpus(tmp_path / "mine", window=16)
    (tmp_path / "empty").mkdir()
    assert prepare(source, tmp_path / "empty").windows > 0


def test_full_disk_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, mode: str) -> Any:
        return open("/dev/full" if path.name.startswith("train") else path, mode)

    monkeypatch.setattr(tokens, "open", full_disk, raising=False)
    with pytest.raises(UserError, match="no disk space left") as caught:
        prepare(source, tmp_path / "corpus")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_failure_keeps_the_corpus_that_was_there(source: Path, tmp_path: Path) -> None:
    before = prepare(source, tmp_path / "corpus").corpus_hash

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "tokenize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "corpus", vocabulary=310, replace=True, progress=interrupt)
    assert load_corpus(tmp_path / "corpus", window=16).corpus_hash == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "text.txt"]


def test_what_a_killed_process_left_does_not_matter(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".corpus.partial").mkdir()
    (tmp_path / ".corpus.partial" / "train-00000.bin").write_bytes(b"half")
    expected = prepare(source, tmp_path / "other").corpus_hash
    assert prepare(source, tmp_path / "corpus").corpus_hash == expected
    assert not (tmp_path / ".corpus.partial").exists()


def test_processes_that_prepare_the_same_corpus_do_it_once(source: Path, tmp_path: Path) -> None:
    script = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from capgap.corpus.prepare import prepare_corpus\n"
        "c = prepare_corpus(sys.argv[1], sys.argv[2], vocabulary=300, window=16)\n"
        "print(c.corpus_hash)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "corpus")]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0][0] == outputs[1][0] != b""
    assert sum(b"preparing the corpus" in log for _, log in outputs) == 1


def test_tokenizer_of_a_folder_and_of_an_object_are_one(
    source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(str(tmp_path / "teacher"))
    first = prepare(source, tmp_path / "corpus", tokenizer=tokenizer)
    made = (first.directory / "manifest.json").stat().st_mtime_ns
    second = prepare(source, tmp_path / "corpus", tokenizer=tmp_path / "teacher")
    assert (second.directory / "manifest.json").stat().st_mtime_ns == made
    assert second.token_hash == first.manifest["options"]["tokenizer_hash"]


def test_documents_are_encoded_in_batches_without_effect(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(source, tmp_path / "whole")
    monkeypatch.setattr(chunks, "BATCH_BYTES", 1000)
    assert prepare(source, tmp_path / "parts").corpus_hash == whole.corpus_hash


def test_tokenizer_sample_is_bounded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[bytes]] = []
    train: Callable[..., PreTrainedTokenizerFast] = module.train_tokenizer

    def spy(documents: list[bytes], vocabulary: int) -> PreTrainedTokenizerFast:
        seen.append(documents)
        return train(documents, vocabulary)

    monkeypatch.setattr(module, "train_tokenizer", spy)
    monkeypatch.setattr(module, "SAMPLE_BYTES_PER_TOKEN", 10)
    corpus = prepare(source, tmp_path / "corpus", heldout_fraction=0.3)
    assert 2000 < sum(map(len, seen[0])) <= 3000
    assert set(seen[0]) <= set(train_text(corpus))


def test_manifest_names_every_file_of_the_source(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "corpus")
    manifest = read_json(corpus.directory / "manifest.json")
    assert manifest == corpus.manifest
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["source"]["files"] == [
        {"path": str(source), "bytes": source.stat().st_size, "sha256": digest}
    ]


def test_too_many_epochs(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "corpus")
    epoch = corpus.windows * 16
    check_epochs(corpus, 4 * epoch, 4)
    with pytest.raises(UserError, match=r"are 4\.5 epochs of the corpus .* more than 4:"):
        check_epochs(corpus, epoch * 9 // 2, 4)


def test_window_must_fit(source: Path, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path / "corpus")
    assert load_corpus(corpus.directory, window=corpus.train_tokens - 1).windows == 1
    for window in (0, corpus.train_tokens):
        with pytest.raises(UserError, match=f"window {window} does not fit"):
            load_corpus(corpus.directory, window=window)


def test_no_windows_in_an_almost_empty_stream(tmp_path: Path) -> None:
    np.arange(16, dtype="<u2").tofile(tmp_path / "a.bin")
    marks = Marks(0, 0, begin_windows=False)
    for window, number in ((16, 0), (15, 1)):
        windows = TokenWindows([[tmp_path / "a.bin"]], np.dtype("<u2"), window, marks)
        assert len(windows) == number
