"""Where text comes from: the standard library, files, folders, globs, Hugging Face datasets."""

import glob
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from capgap.artifact import file_hash
from capgap.corpus.names import HUB_NAME, MANIFEST, check_prepared, hub_revision, looks_like_path
from capgap.corpus.readers import (
    SUFFIXES,
    NoText,
    has_rows,
    kind_of,
    named,
    read_documents,
    text_of_row,
)
from capgap.errors import UserError
from capgap.mirror import local

STANDARD_LIBRARY = "stdlib"
PYTHON_DOCUMENTATION = "pydoc"
# Its topics are cut at empty lines into documents of about this size
TOPIC_CHARACTERS = 4_000
DEFAULT_SEPARATOR = "<|endoftext|>"
# What stands beside data in a repository of it
PAPERS = (
    *("readme", "license", "licence", "notice", "changelog", "contributing", "citation"),
    *("code_of_conduct", "security", "authors"),
)
# What the library datasets writes beside its tables
ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")


@dataclass(frozen=True)
class Source:
    """Text that can be read any number of times, always in the same order.

    Attributes:
        name: what the user wrote.
        kind: which reading it got.
        root: the folder that the files' names in the manifest are relative to, if there is one.
        files: what it is read from, sorted; empty for a dataset.
        left_out: what lies there too and is not read, by what it is: {"*.pdf": 3, "hidden": 1}.
    """

    name: str
    kind: Literal["stdlib", "pydoc", "files", "dataset"]
    root: Path | None = None
    files: tuple[Path, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    text_column: str = "text"
    separator: str = DEFAULT_SEPARATOR

    def documents(self) -> Iterator[bytes]:
        """Every document that is more than white space, one after the other; UserError: a file or
        the hub cannot be read, or the text column is missing."""
        parts: Iterable[Iterator[bytes]]
        if self.kind == "dataset":
            parts = [_read_dataset(self.name, self.text_column)]
        elif self.kind == "pydoc":
            parts = [_topics()]
        else:
            options = {"text_column": self.text_column, "separator": self.separator}
            parts = (read_documents(path, **options) for path in self.files)
        return (document for part in parts for document in part if document.strip())

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the source changes, without reading it: sizes and times of files; of a
        dataset the name alone, so that a prepared corpus can be reused without a network."""
        files = [(path, _status(path)) for path in self.files]
        return {
            "name": self.name,
            "kind": self.kind,
            "text_column": self.text_column,
            "separator": self.separator,
            "files": [[str(path), status.st_size, status.st_mtime_ns] for path, status in files],
        }

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source; reads every file once for its sha256."""
        described: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.kind == "dataset":
            dataset, _, _ = _dataset_parts(self.name)
            return described | {"revision": hub_revision(dataset, kind="dataset")}
        if self.kind in ("stdlib", "pydoc"):
            described["python"] = sys.version.split()[0]
        described["files"] = [
            {
                "path": str(path.relative_to(self.root) if self.root else path),
                "bytes": _status(path).st_size,
                "sha256": file_hash(path),
            }
            for path in self.files
        ]
        return described | {"left_out": self.left_out}


def open_source(
    source: str, *, text_column: str = "text", separator: str = DEFAULT_SEPARATOR
) -> Source:
    """Find out what `source` names; reads no text yet.

    Args:
        source: `stdlib` (every .py file of the running interpreter's standard library), `pydoc`
            (its documentation's topics, English prose), a file, a folder (its text, JSON, parquet,
            arrow and archives; hidden files and a data set's README are left out), a glob, or a
            Hugging Face dataset as `name`, `name:config` or `name:config:split` (split `train` if
            none is named).
        text_column: the column with the text, for JSON lines, parquet and datasets.
        separator: the line that parts documents within a text file; if empty, none is parted.

    Raises:
        UserError: nothing of that name, or nothing in it that can be read.
    """
    if not source.strip():
        raise UserError("the corpus has no name: give a file, folder, glob, dataset or 'stdlib'")
    if "\n" in separator:
        raise UserError(f"separator {separator!r} must be the text of exactly one line")
    opened = partial(Source, source, text_column=text_column, separator=separator)
    if source in (STANDARD_LIBRARY, PYTHON_DOCUMENTATION):
        root = Path(sysconfig.get_path("stdlib"))
        topics = root / "pydoc_data" / "topics.py"
        if not (topics if source == PYTHON_DOCUMENTATION else root / "os.py").is_file():
            raise UserError(
                f"corpus {source!r}: this Python has no {source} (no standard library as files in "
                f"{root}); name a text file or folder instead"
            )
        if source == PYTHON_DOCUMENTATION:
            return opened("pydoc", files=(topics,))
        files, _ = _walk(root, skip=("site-packages", "dist-packages"))
        return opened("stdlib", root, tuple(path for path in files if path.suffix == ".py"))
    path = Path(local(source))
    if path.is_dir():
        files, hidden = _walk(path)
        files, left_out = _with_text(files, text_column=text_column)
        left_out = ({"hidden": hidden} if hidden else {}) | left_out
        if not files:
            raise UserError(
                f"folder {path} holds no text, JSON, parquet, arrow or archive of them (left out: "
                f"{describe_left_out(left_out) or 'nothing'}); for files of other names give a "
                f"glob such as {path}/*.log"
            )
        return opened("files", path, files, left_out)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{source} is no file that can be read twice: give a file or a folder")
        kind_of(path)  # refuses what is no text
        return opened("files", files=(path,))
    if glob.has_magic(source):
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        files, left_out = _with_text(match for match in matches if match.is_file())
        if not files:
            raise UserError(
                f"no file matches {path} that holds text (left out: "
                f"{describe_left_out(left_out) or 'nothing'})"
            )
        return opened("files", files=files, left_out=left_out)
    if looks_like_path(source, suffixes=SUFFIXES):
        raise UserError(f"no such file or folder: {source}")
    _dataset_parts(source)
    return opened("dataset")


def check_text(named: Path) -> None:
    """UserError where there is neither a prepared corpus nor text. A data set on the Hub must have
    its owner in its name, so that a misspelt folder is told without asking the Hub."""
    name = str(named)
    repository = name.split(":")[0]
    is_dataset = "/" in name and HUB_NAME.fullmatch(repository) and not looks_like_path(name)
    is_here = named.exists() or glob.has_magic(name)
    is_text = is_here or is_dataset or name in (STANDARD_LIBRARY, PYTHON_DOCUMENTATION)
    if not is_text or (named / MANIFEST).is_file():
        check_prepared(named)
    elif open_source(name).kind == "dataset":
        hub_revision(repository, kind="dataset")


def _topics() -> Iterator[bytes]:
    """The topics of `help()` in pieces of whole paragraphs."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        piece = ""
        for paragraph in topics[name].split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= TOPIC_CHARACTERS:
                yield piece.encode()
                piece = ""
        yield piece.encode()


def _with_text(
    paths: Iterable[Path], *, text_column: str | None = None
) -> tuple[tuple[Path, ...], dict[str, int]]:
    """The files that hold text, and how many others by what they are. With a `text_column` they
    are a folder's, and their names decide too."""
    kinds: dict[Path, str | None] = {}
    for path in paths:
        name = path.name.lower()
        kinds[path] = None
        if text_column is not None and (not name.endswith(SUFFIXES) or name in ABOUT):
            continue
        with suppress(NoText):
            kind: str | None = kind_of(path)
            # other JSON is settings
            if text_column is None or not name.endswith(".json") or has_rows(path, text_column):
                kinds[path] = kind
    has_data = text_column is not None and set(kinds.values()) - {"text", "document", None}
    files = []
    left_out: Counter[str] = Counter()
    for path, kind in kinds.items():
        is_paper = has_data and path.name.lower().startswith(PAPERS)
        if kind is None or is_paper:
            left_out[f"*{path.suffix}" if path.suffix and not is_paper else path.name] += 1
        else:
            files.append(path)
    return tuple(files), dict(left_out)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """ "3 *.pdf, 1 hidden" """
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))


def _walk(root: Path, *, skip: tuple[str, ...] = ()) -> tuple[tuple[Path, ...], int]:
    """All files, those of linked folders too, each folder once, and the number of hidden names."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    hidden = 0
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        folders.clear()
        for name, target in targets.items():
            if not (name.startswith(".") or name in skip or target in seen):
                seen.add(target)
                folders.append(name)
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    # a link may point nowhere; only what is there as a file is part of the text
    return tuple(sorted(path for path in files if path.is_file())), hidden


def _status(path: Path) -> os.stat_result:
    with named(path):
        return path.stat()


def _dataset_parts(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of `name[:config[:split]]`."""
    name, *rest = source.split(":")
    if not HUB_NAME.fullmatch(name) or len(rest) > 2:
        raise UserError(
            f"{source!r} is neither a file nor a dataset name (name, name:config or "
            "name:config:split)"
        )
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) == 2 and rest[1] else "train"
    return name, config, split


def dataset_rows(source: str) -> tuple[str, Iterable[dict[str, Any]]]:
    """The commit that a dataset's name stands for now, and its rows; UserError as that."""
    name, config, split = _dataset_parts(source)
    # Asked first and once: the datasets library would retry for minutes without a network. The
    # revision keeps a second reading equal to the first.
    revision = hub_revision(name, kind="dataset")
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True, revision=revision)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"dataset {source!r}: {str(error).splitlines()[0]}") from error
    return revision, rows


def _read_dataset(source: str, text_column: str) -> Iterator[bytes]:
    for row in dataset_rows(source)[1]:
        yield from text_of_row(f"dataset {source!r}", row, text_column)
