import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import socket
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from capgap.corpus import readers
from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.sources import describe_left_out, open_source
from capgap.errors import UserError

SEPARATED = b"one\nline two\n<|endoftext|>\n  two\n\n<|endoftext|>\r\n\n<|endoftext|>\nlast"
DOCUMENTS = [b"one\nline two\n", b"  two\n\n", b"last"]
ROWS = [{"text": "one"}, {"text": "tw\u00f6\n\n"}, {"text": None}, {"text": "  "}, {"text": "end"}]
TEXTS = [b"one", "tw\u00f6\n\n".encode(), b"end"]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source: Path | str, **options: str) -> list[bytes]:
    return list(open_source(str(source), **options).documents())


def test_standard_library() -> None:
    source = open_source("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    assert source.files == tuple(sorted(source.files))
    assert {root / "os.py", root / "json" / "decoder.py"} <= set(source.files)
    assert all(path.suffix == ".py" for path in source.files)
    assert not any("-packages" in part for path in source.files for part in path.parts)
    assert next(source.documents()) == source.files[0].read_bytes()


def test_standard_library_that_is_not_there_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(UserError, match="no standard library as files"):
        open_source("stdlib")


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_is_parted_at_separator_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"book.txt{ending}"
    path.write_bytes(COMPRESS[ending](SEPARATED))
    assert read(path) == DOCUMENTS
    path.write_bytes(COMPRESS[ending](b"a\n---\nb --- c\n"))
    assert read(path, separator="---") == [b"a\n", b"b --- c\n"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_empty_separator_leaves_every_file_whole(tmp_path: Path, ending: str) -> None:
    # without a separator of its own it would be cut between paragraphs
    long = b"".join(b"paragraph %d\n\n" % number for number in range(10_000))
    for number, text in enumerate((SEPARATED, long)):
        (tmp_path / f"{number}.txt{ending}").write_bytes(COMPRESS[ending](text))
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    assert len(read(tmp_path / f"1.txt{ending}")) > 1
    assert read(tmp_path, separator="") == [SEPARATED, long, b"one", b"two"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending]("\n".join(map(json.dumps, ROWS)).encode()))
    assert read(path) == TEXTS
    with pytest.raises(UserError, match=r"line 1 has no column 'body'; it has 'text'"):
        read(path, text_column="body")


def test_json_lines_keep_invalid_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "half \\ud83d"}\n')
    assert read(path) == [b"caf\xe9", b"half \xed\xa0\xbd"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "line 2 is not JSON"),
        (b"[1]", "no JSON object but list"),
        (b'{"text": 3}', "column 'text' holds int, not text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [row["text"] for row in ROWS], "number": list(range(5))})
    pyarrow.parquet.write_table(table, path)
    assert read(path) == TEXTS
    with pytest.raises(UserError, match="no column 'body'; it has 'text', 'number'"):
        read(path, text_column="body")
    with pytest.raises(UserError, match="holds int, not text"):
        read(path, text_column="number")


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_compressed_tables(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.parquet{ending}"
    plain = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [row["text"] for row in ROWS]})
    pyarrow.parquet.write_table(table, plain)
    path.write_bytes(COMPRESS[ending](plain.read_bytes()))
    assert read(path) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.txt.xz", "a.txt.zst", "a.jsonl.gz"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is nothing of the kind, but long enough to look at")
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_truncated_files_are_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    data = COMPRESS[ending](b"".join(b"%d\n" % (i * 7919) for i in range(50_000)))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot read"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](b"first ") + COMPRESS[ending](b"second"))
    assert read(path) == [b"first second"]


def test_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in {
        "b.txt": b"text\n<|endoftext|>\nmore",
        "a.md": b"kept\n<|endoftext|>\nwhole",
        "sub/c.py": b"pass",
        "picture.png": b"\x89PNG",
        "rows.jsonl": b'{"text": "row"}',
        "empty.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    whole = b"kept\n<|endoftext|>\nwhole"
    assert read(tmp_path) == [whole, b"text\n", b"more", b"row", b"pass"]
    assert open_source(str(tmp_path)).left_out == {"*.png": 1}
    assert read(tmp_path / "*.md") == [whole]
    assert read(tmp_path / "**" / "*.py") == [b"pass"]
    assert read(tmp_path / "*.jsonl") == [b"row"]
    with pytest.raises(UserError, match="no file matches"):
        read(tmp_path / "*.png")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"holds no text, JSON, parquet, arrow or archive"):
        read(tmp_path / "other")


def test_a_file_of_any_name_is_text(tmp_path: Path) -> None:
    path = tmp_path / "README"
    path.write_bytes(b"caf\xe9 \xff\n")
    assert read(path) == [b"caf\xe9 \xff\n"]


@pytest.mark.parametrize("name", ["/no/such", "./none", "~/none/at/all", "gone.txt", "x.jsonl.zst"])
def test_missing_paths_are_not_taken_for_datasets(name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_source(name)


@pytest.mark.parametrize("name", ["", "two words", "a:b:c:d", "a/b/c", "name#"])
def test_names_that_can_be_nothing(name: str) -> None:
    with pytest.raises(UserError, match=r"corpus has no name|neither a file nor a dataset name"):
        open_source(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_bytes(b"text")
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
        read(path)


def test_document_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    path = tmp_path / "a.txt"
    path.write_bytes(b"short\n<|endoftext|>\n" + b"a line\n" * 200)
    with pytest.raises(UserError, match="set `separator`"):
        read(path)


def test_description_and_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    source = open_source(str(tmp_path))
    digest = hashlib.sha256(b"text").hexdigest()
    assert source.describe() == {
        "name": str(tmp_path),
        "kind": "files",
        "files": [{"path": "a.txt", "bytes": 4, "sha256": digest}],
        "left_out": {},
    }
    before = source.fingerprint()
    assert open_source(str(tmp_path)).fingerprint() == before
    (tmp_path / "a.txt").write_bytes(b"TEXT")
    os.utime(tmp_path / "a.txt", ns=(0, 1))
    assert source.fingerprint() != before


def test_dataset_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    source = open_source("some-team/some-dataset:config")
    assert source.kind == "dataset"
    with pytest.raises(UserError, match=r"'some-team/some-dataset'.* needs a network"):
        next(source.documents())
    # What is prepared can be reused all the same.
    assert source.fingerprint()["name"] == "some-team/some-dataset:config"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("team/data", ("team/data", None, "train")),
        ("team/data:en", ("team/data", "en", "train")),
        ("data::test", ("data", None, "test")),
        ("data:en:test", ("data", "en", "test")),
    ],
)
def test_dataset_rows(
    name: str, asked: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load(
        path: str, config: str | None, *, split: str, streaming: bool, revision: str
    ) -> object:
        assert streaming
        assert revision == "abc"
        calls.append((path, config, split))
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr("capgap.corpus.sources.hub_revision", lambda name, kind: "abc")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(name) == TEXTS
    assert calls == [asked]
    assert open_source(name).describe() == {"name": name, "kind": "dataset", "revision": "abc"}
    with pytest.raises(UserError, match="no column 'body'; it has 'text'"):
        read(name, text_column="body")


@pytest.mark.parametrize("limits", [{"max_documents": 3}, {"max_bytes": 3 * 200}])
def test_nothing_of_a_dataset_is_fetched_beyond_the_limit(
    limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    fetched: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(50):
            fetched.append(number)
            # the second row is the first one again
            yield {"text": f"{max(1, number)} ".rjust(4) * 50}

    monkeypatch.setattr("capgap.corpus.sources.hub_revision", lambda name, kind: "abc")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    made = prepare_corpus("owner/data", tmp_path / "c", vocabulary=300, window=16, **limits)
    counts = made.manifest
    assert counts["documents"] == {"read": 4, "duplicates": 1, "in_heldout_source": 0}
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 3
    # in each of the two passes
    assert fetched == [0, 1, 2, 3] * 2


def test_unknown_dataset_config(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> object:
        raise ValueError("BuilderConfig 'xx' not found. Available: ['en']\nmore")

    monkeypatch.setattr("capgap.corpus.sources.hub_revision", lambda name, kind: "abc")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"dataset 'data:xx': .*Available: \['en'\]$"):
        read("data:xx")


# --- by bytes, whatever the name ----------------------------------------------------------------

LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c4-train.00000-of-00012.json.gz", gzip.compress(LINES, mtime=0)),
        ("rows.ndjson", LINES),
        ("rows.json", LINES),
        ("rows.json.bz2", bz2.compress(LINES)),
        ("rows", LINES),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("list.json", json.dumps(ROWS).encode()),
        ("list.json", json.dumps(ROWS, indent=2).encode()),
        ("within.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    ],
    # bytes in a name differ between the processes that collect it
    ids=range(9),
)
def test_json_of_any_form(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == TEXTS
    if "." in name:
        assert read(tmp_path) == TEXTS


def test_arrow_as_a_file_and_as_a_stream(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [row["text"] for row in ROWS]})
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(tmp_path) == TEXTS * 2
    with pytest.raises(UserError, match="no column 'body'; it has 'text'"):
        read(tmp_path / "a.arrow", text_column="body")


def archive_members() -> dict[str, bytes]:
    return {
        "data/a.jsonl.gz": gzip.compress(LINES),
        "data/b.txt": SEPARATED,
        "data/.hidden.txt": b"no",
        "c.png": b"\x89PNG\r\n",
    }


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst", "a.zip"])
def test_archives_give_the_documents_of_their_files(tmp_path: Path, name: str) -> None:
    path, plain = tmp_path / name, io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(plain, "w") as archive:
            for member, data in archive_members().items():
                archive.writestr(member, data)
        path.write_bytes(plain.getvalue())
    else:
        with tarfile.open(fileobj=plain, mode="w") as archive:
            for member, data in archive_members().items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        ending = {".tgz": ".gz"}.get(path.suffix, path.suffix)
        path.write_bytes(COMPRESS.get(ending, bytes)(plain.getvalue()))
    assert read(path) == TEXTS + DOCUMENTS


def test_a_data_sets_folder_gives_its_data_and_not_its_papers(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(LINES)
    for name in ("README.md", "LICENSE.txt", "paper.pdf"):
        (tmp_path / name).write_bytes(b"about it")
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.txt").write_text("another program's")
    assert read(tmp_path) == TEXTS
    left_out = open_source(str(tmp_path)).left_out
    assert left_out == {
        "README.md": 1, "LICENSE.txt": 1, "*.pdf": 1, "*.json": 1, "hidden": 1
    }  # fmt: skip
    assert describe_left_out({"*.pdf": 3, "hidden": 1}) == "3 *.pdf, 1 hidden"


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "elsewhere" / "b.txt").write_text("two")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "texts")
    assert sorted(read(tmp_path / "texts")) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", "text in two bytes each".encode("utf-16"), "is UTF-16"),
        ("a.pdf", b"%PDF-1.7", "is PDF and no text"),
        ("a.bin", b"\0\1\2", "is binary and no text"),
        ("a.json", b'{"text": ' + b"[" * 100_000, "nested too deep|is not JSON"),
        ("a.parquet", b"no table", "by its name it is parquet"),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told):
        read(tmp_path / name)


def test_pipes_and_devices_are_no_sources(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="no file that can be read twice"):
            read(name)


def test_one_big_text_is_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [b"%d " % number * 300 + b"\n\n" for number in range(300)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(paragraphs))
    found = read(path)
    assert b"".join(found) == path.read_bytes()
    assert len(found) > 10
    assert all(one.endswith(b"\n\n") for one in found)
    assert min(map(len, found[:-1])) >= readers.PIECE_BYTES
    # with separators documents stay whole
    path.write_bytes(b"a\n<|endoftext|>\n" + b"".join(paragraphs))
    assert len(read(path)) == 2
    # one line without end
    path.write_bytes(b"word " * 100_000)
    assert b"".join(read(path)) == path.read_bytes()
    assert max(map(len, read(path))) <= 8 * readers.PIECE_BYTES
