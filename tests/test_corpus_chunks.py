"""A corpus is the same however many chunks it is read in, and whoever reads them."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from capgap.corpus import chunks
from capgap.corpus.split import SmallestDigests
from capgap.errors import UserError, WorkerDied
from capgap.in_order import in_order
from test_corpus_prepare import make_document, write_documents
from test_corpus_prepare import prepare as prepared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files, with documents that come again in the same file and in others."""
    folder = tmp_path / "text"
    folder.mkdir()
    drawn = random.Random(0)
    for number in range(7):
        documents = [make_document(drawn.randrange(150)) for _ in range(40)]
        write_documents(folder / f"{number}.txt", [*documents, b"bytes \xff\xfe that are no text"])
    return folder


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.txt"
    write_documents(path, [make_document(number) for number in (3, 3, 7, 200, 201)])
    return path


def told(out: Path, source: Path, **options: Any) -> dict[str, Any]:
    """The manifest but for what was asked."""
    return {**prepared(source, out, **options).manifest, "request": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_bytes": 20_000},
        {"max_documents": 60},
        {"max_train_tokens": 3_000},
        {"heldout": True},
        {"heldout": True, "max_train_tokens": 2_345, "max_bytes": 40_000},
    ],
)
def test_chunks_change_no_byte(folder, heldout, tmp_path, monkeypatch, options):
    if options.pop("heldout", False):
        options["heldout_source"] = str(heldout)
    whole = told(tmp_path / "whole", folder, **options)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "PARTITION_BYTES", 999)
    assert told(tmp_path / "parts", folder, **options) == whole
    assert not list(tmp_path.glob(".*.chunks"))


def test_processes_change_no_byte(folder, tmp_path, monkeypatch):
    limit = {"max_train_tokens": 3_000}
    whole = told(tmp_path / "whole", folder, **limit)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    assert told(tmp_path / "parts", folder, workers=2, **limit) == whole


def test_a_stopped_preparation_goes_on_file_by_file(folder, tmp_path, monkeypatch):
    whole = told(tmp_path / "whole", folder)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    read: list[str] = []
    read_documents = chunks.Source.documents

    def noted(source):
        read.append(source.files[0].name)
        return read_documents(source)

    monkeypatch.setattr(chunks.Source, "documents", noted)

    def stop_at(stage, count):
        calls = []

        def progress(part, done, total):
            calls.append(part)
            if calls.count(stage) == count:
                raise KeyboardInterrupt

        return progress

    for stage, count in (("read", 3), ("tokenize", 4)):
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, tmp_path / "out", progress=stop_at(stage, count))
    assert told(tmp_path / "out", folder) == whole
    # each file once in either pass, and the two that were just done as it was stopped
    assert sorted(read) == sorted(2 * [f"{number}.txt" for number in range(7)])
    assert not list(tmp_path.glob(".*.chunks"))


def test_of_a_mended_file_the_others_are_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    good = (folder / "5.txt").read_bytes()
    (folder / "5.jsonl").write_text("no JSON")
    (folder / "5.txt").unlink()
    with pytest.raises(UserError, match=r"5\.jsonl, line 1 is not JSON"):
        prepared(folder, tmp_path / "out")
    kept = sorted(path.name for path in tmp_path.glob(".out.chunks/*.read.json"))
    assert len(kept) == 5
    (folder / "5.jsonl").unlink()
    (folder / "5.txt").write_bytes(good)
    assert told(tmp_path / "out", folder) == told(tmp_path / "whole", folder)


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_digests_are_the_same_in_any_order(seed):
    drawn = random.Random(seed)
    documents = [(digest, bytes(drawn.randrange(1, 40))) for digest in drawn.sample(range(999), 80)]
    found = []
    for _ in range(3):
        kept = SmallestDigests(max_bytes=150)
        drawn.shuffle(documents)
        for one in documents + documents[:20]:
            kept.add(*one)
        found.append(kept.documents())
    assert found[0] == found[1] == found[2]
    room, fitting = 150, []
    for one in sorted(documents):
        room -= len(one[1])
        if room < 0:
            break
        fitting.append(one)
    assert found[0] == (fitting or sorted(documents)[:1])


def test_results_come_in_order_and_few_are_asked_for_ahead():
    asked = []

    def arguments():
        for number in range(20):
            asked.append(number)
            yield (number, 7)

    found = []
    for result in in_order(divmod, arguments(), workers=2):
        found.append(result)
        assert len(asked) - len(found) <= 4
    assert found == [divmod(number, 7) for number in range(20)]


def test_a_worker_that_dies_is_told():
    with pytest.raises(WorkerDied, match="try fewer `workers`"):
        list(in_order(os._exit, [(9,)], workers=2))
