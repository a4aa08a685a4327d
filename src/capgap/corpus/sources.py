"""Where text comes from: the standard library, files, folders, globs, Hugging Face datasets."""

import glob
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from capgap.artifact import file_hash
from capgap.corpus.hub import HUB_NAME, hub_revision, looks_like_path
from capgap.corpus.readers import (
    SUFFIXES,
    Kind,
    NoText,
    has_rows,
    kind_of,
    named,
    read_documents,
    text_of_row,
)
from capgap.errors import UserError

STANDARD_LIBRARY = "stdlib"
PYTHON_DOCUMENTATION = "pydoc"
# Its topics are cut at empty lines into documents of about this size
TOPIC_CHARACTERS = 4_000
DEFAULT_SEPARATOR = "<|endoftext|>"


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
    root: Path | None
    files: tuple[Path, ...]
    text_column: str
    separator: str
    left_out: dict[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[bytes]:
        """Yield every document that is more than white space, one after the other.

        Raises:
            UserError: a file or the hub cannot be read, or the text column is missing.
        """
        for document in self._read():
            if document.strip():
                yield document

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the source changes, without reading it: sizes and times of files.

        A dataset has its name alone, so that a prepared corpus can be reused without a network.
        """
        files = []
        for path in self.files:
            status = _status(path)
            files.append([str(path), status.st_size, status.st_mtime_ns])
        return {
            "name": self.name,
            "kind": self.kind,
            "text_column": self.text_column,
            "separator": self.separator,
            "files": files,
        }

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source; reads every file once for its sha256."""
        description: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.kind == "dataset":
            dataset, _, _ = _dataset_parts(self.name)
            description["revision"] = hub_revision(dataset, kind="dataset")
            return description
        if self.kind in ("stdlib", "pydoc"):
            description["python"] = sys.version.split()[0]
        description["files"] = [
            {"path": self._label(path), "bytes": _status(path).st_size, "sha256": file_hash(path)}
            for path in self.files
        ]
        description["left_out"] = self.left_out
        return description

    def _label(self, path: Path) -> str:
        return str(path if self.root is None else path.relative_to(self.root))

    def _read(self) -> Iterator[bytes]:
        if self.kind == "dataset":
            yield from _read_dataset(self.name, self.text_column)
            return
        if self.kind == "pydoc":
            yield from _topics()
            return
        for path in self.files:
            yield from read_documents(path, text_column=self.text_column, separator=self.separator)


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
        separator: the line that parts documents within a text file.

    Raises:
        UserError: nothing of that name, or nothing in it that can be read.
    """
    if not source.strip():
        raise UserError("the corpus has no name: give a file, folder, glob, dataset or 'stdlib'")
    if not separator or "\n" in separator:
        raise UserError(f"separator {separator!r} must be the text of exactly one line")
    options: dict[str, Any] = {"text_column": text_column, "separator": separator}
    if source == STANDARD_LIBRARY:
        root, files = _standard_library_files()
        return Source(source, "stdlib", root, files, **options)
    if source == PYTHON_DOCUMENTATION:
        return Source(source, "pydoc", None, (_topics_file(),), **options)
    path = Path(source).expanduser()
    if path.is_dir():
        files, left_out = _folder_files(path, text_column)
        return Source(source, "files", path, files, **options, left_out=left_out)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{source} is no file that can be read twice: give a file or a folder")
        kind_of(path)  # refuses what is no text
        return Source(source, "files", None, (path,), **options)
    if glob.has_magic(source):
        files, left_out = _glob_files(str(path))
        return Source(source, "files", None, files, **options, left_out=left_out)
    if looks_like_path(source, suffixes=SUFFIXES):
        raise UserError(f"no such file or folder: {source}")
    _dataset_parts(source)
    return Source(source, "dataset", None, (), **options)


def _standard_library_files() -> tuple[Path, tuple[Path, ...]]:
    root = Path(sysconfig.get_path("stdlib"))
    _check_python(STANDARD_LIBRARY, root / "os.py", f"standard library as files in {root}")
    found = _walk(root, Counter(), skip=("site-packages", "dist-packages"))
    return root, tuple(path for path in found if path.suffix == ".py")


def _topics_file() -> Path:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    _check_python(PYTHON_DOCUMENTATION, path, f"documentation in {path}")
    return path


def _check_python(source: str, path: Path, what: str) -> None:
    if not path.is_file():
        raise UserError(
            f"corpus {source!r}: this Python has no {what}; name a text file or folder instead"
        )


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


# What stands beside data in a repository of it
_PAPERS = (
    *("readme", "license", "licence", "notice", "changelog", "contributing", "citation"),
    *("code_of_conduct", "security", "authors"),
)
# What the library datasets writes beside its tables
_ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")


def _folder_files(folder: Path, text_column: str) -> tuple[tuple[Path, ...], dict[str, int]]:
    """The text in a folder and how much of what else was left out."""
    left_out: Counter[str] = Counter()
    found = _walk(folder, left_out)
    kinds = {path: _kind_in_folder(path, text_column) for path in found}
    has_data = any(kind not in ("text", "document", None) for kind in kinds.values())
    files = []
    for path, kind in kinds.items():
        is_paper = has_data and path.name.lower().startswith(_PAPERS)
        if kind is None or is_paper:
            left_out[f"*{path.suffix}" if path.suffix and not is_paper else path.name] += 1
        else:
            files.append(path)
    if not files:
        raise UserError(
            f"folder {folder} holds no text, JSON, parquet, arrow or archive of them"
            f"{_told(left_out)}; for files of other names give a glob such as {folder}/*.log"
        )
    return tuple(files), dict(left_out)


def _kind_in_folder(path: Path, text_column: str) -> Kind | None:
    """None for what is no text, by its name or its bytes."""
    name = path.name.lower()
    if not name.endswith(SUFFIXES) or name in _ABOUT:
        return None
    try:
        kind = kind_of(path)
    except NoText:
        return None
    is_settings = name.endswith(".json") and not has_rows(path, text_column)
    return None if is_settings else kind


def _glob_files(pattern: str) -> tuple[tuple[Path, ...], dict[str, int]]:
    left_out: Counter[str] = Counter()
    files = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        if not path.is_file():
            continue
        try:
            kind_of(path)
        except NoText:
            left_out[f"*{path.suffix}"] += 1
            continue
        files.append(path)
    if not files:
        raise UserError(f"no file matches {pattern} that holds text{_told(left_out)}")
    return tuple(files), dict(left_out)


def _told(left_out: Mapping[str, int]) -> str:
    return f" (left out: {describe_left_out(left_out)})" if left_out else ""


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """ "3 *.pdf, 1 hidden" """
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))


def _walk(root: Path, left_out: "Counter[str]", *, skip: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """All files, those of linked folders too, each folder once; hidden ones are counted alone."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error

    files = []
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        kept = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(folder, name))
            if name.startswith(".") or name in skip or place in seen:
                continue
            seen.add(place)
            kept.append(name)
        folders[:] = kept
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    if not left_out["hidden"]:
        del left_out["hidden"]
    # A link may point nowhere; only what is there as a file is part of the text.
    return tuple(sorted(path for path in files if path.is_file()))


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


def _read_dataset(source: str, text_column: str) -> Iterator[bytes]:
    name, config, split = _dataset_parts(source)
    # Asked first and once: the datasets library would retry for minutes without a network. The
    # revision keeps a second reading equal to the first.
    revision = hub_revision(name, kind="dataset")
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True, revision=revision)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"dataset {source!r}: {str(error).splitlines()[0]}") from error
    for row in rows:
        yield from text_of_row(f"dataset {source!r}", row, text_column)
