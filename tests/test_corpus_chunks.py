"""A corpus is the same however many chunks it is read in, and whoever reads them."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capgap.corpus import chunks, prepare
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


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_bytes": 20_000}, {}),
        ({"max_bytes": 20_000}, {"max_bytes": 15_000}),
        ({}, {"max_bytes": 15_000}),
        ({"max_documents": 60}, {"max_documents": 30}),
    ],
)
def test_what_another_request_left_serves_no_other(folder, tmp_path, monkeypatch, first, then):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    begun(monkeypatch, folder, tmp_path / "out", **first)
    assert list(tmp_path.glob(".out.chunks/*"))
    assert told(tmp_path / "out", folder, **then) == told(tmp_path / "whole", folder, **then)


def test_a_shorter_file_moves_what_limits_leave_of_the_next(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    limit = {"max_bytes": 20_000}
    begun(monkeypatch, folder, tmp_path / "out", **limit)
    write_documents(folder / "0.txt", [make_document(0)])
    assert told(tmp_path / "out", folder, **limit) == told(tmp_path / "whole", folder, **limit)


def begun(monkeypatch, folder: Path, out: Path, **options: Any) -> None:
    """A preparation that is stopped when all chunks are written."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "cut_for_evaluation", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, out, **options)


def test_the_sample_of_a_tokenizer_is_that_of_one_chunk(tmp_path, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    write_documents(folder / "0.txt", [make_document(one) for one in range(200)])
    write_documents(folder / "1.txt", [make_document(one, words=5) for one in range(200, 230)])
    monkeypatch.setattr(prepare, "SAMPLE_BYTES_PER_TOKEN", 20)
    whole = told(tmp_path / "whole", folder)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    assert told(tmp_path / "parts", folder) == whole


def test_many_chunks_and_shards_with_few_open_files(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(150):
        write_documents(folder / f"{number:03d}.txt", [make_document(number)])
    code = (
        "import sys\n"
        "from capgap.corpus import chunks, tokens\n"
        "from capgap.corpus.prepare import prepare_corpus\n"
        "chunks.CHUNK_BYTES, tokens.SHARD_TOKENS = 1, 50\n"
        "made = prepare_corpus(sys.argv[1], sys.argv[2], vocabulary=300, window=16)\n"
        "print(len(made.manifest['train']['shards']), len(made.train.windows_at([0, 1])))"
    )
    words = [sys.executable, "-c", code, folder, tmp_path / "out"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 100; exec "$@"', "-", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shards, windows = map(int, done.stdout.split())
    assert (shards > 100, windows) == (True, 2)


def test_a_script_that_is_loaded_again_is_told(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from capgap.corpus import chunks\n"
        "from capgap.corpus.prepare import prepare_corpus\n"
        "chunks.CHUNK_BYTES = 1\n"
        "prepare_corpus(*sys.argv[1:], vocabulary=300, workers=2)"
    )
    words = [sys.executable, script, folder, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr


def test_processes_that_cannot_be_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="workers 0 must be 1 or more"):
        prepared(folder, tmp_path / "out", workers=0)


def test_a_cluster_that_is_not_there_is_told_at_once(folder, tmp_path, typed, monkeypatch):
    pytest.importorskip("ray", reason="capgap[ray] is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    answer = typed("corpus", folder, "--out", tmp_path / "out", "--on", "ray")
    assert answer.code == 2
    assert "capgap: cannot join the Ray cluster 127.0.0.1:1: " in answer.err
    assert "Connection refused" in answer.err


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


@pytest.mark.parametrize(
    ("chunk_bytes", "told"),
    [
        (1, "what is done is kept in .out.chunks, the same command continues"),
        (10**9, "nothing was written"),
    ],
)
def test_a_stopped_command_says_what_is_kept(
    folder, tmp_path, monkeypatch, typed, chunk_bytes, told
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(prepare, "cut_for_evaluation", stop)
    answer = typed("corpus", folder, "--out", "out", "--vocabulary", "300", "--quiet")
    assert (answer.code, answer.err) == (130, f"capgap: stopped; {told}\n")
