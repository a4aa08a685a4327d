"""Documents out of one file, by its bytes: text, JSON, parquet, arrow; compressed, in archives."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from capgap.errors import UserError, first_line

Kind = Literal["text", "document", "json", "parquet", "arrow", "tar", "zip"]

# What a folder's files are called; a file or glob that is named may be called anything
TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".zip")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
SUFFIXES = tuple(
    suffix + end
    for suffix in (*TEXT_SUFFIXES, *ROW_SUFFIXES, *ARCHIVE_SUFFIXES)
    for end in ("", *COMPRESSIONS)
)

# A document is held in memory whole, so a file without separators must not be unlimited.
MAX_DOCUMENT_BYTES = 1 << 30
# So far a text is read on for a separator
MAX_WHOLE_BYTES = 1 << 26
# Text without any separator is cut at the first empty line behind so many bytes, at the first line
# or white space behind four times as many
PIECE_BYTES = 1 << 14
HEAD_BYTES = 1 << 12
_MAGIC: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
}
_CLAIMS = {
    ".gz": "gzip", ".tgz": "gzip", ".xz": "xz", ".zst": "zstandard", ".bz2": "bzip2",
    ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar", ".zip": "zip",
}  # fmt: skip
_OTHER = {b"%PDF": "PDF", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"PK\5\6": "zip"}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_UTF_8_MARK = b"\xef\xbb\xbf"
_BROKEN = (
    *(OSError, EOFError, UnicodeDecodeError),
    *(lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile),
)


class NoText(UserError):
    """A file that holds no text; who reads a folder may leave it out."""


def read_documents(path: Path, *, text_column: str, separator: str) -> Iterator[bytes]:
    """Yield the documents of one file in order; its first bytes decide how it is read.

    Markdown and Python files are one document each. Any other text is split at lines that hold
    the separator alone; one of many paragraphs without such a line is cut into pieces between
    paragraphs. JSON (a list of objects, or one a line), parquet and arrow give one document a row,
    from `text_column`; a row whose text is null gives none. Archives give those of their files.

    Raises:
        UserError: the file cannot be read, is broken, holds no text, or lacks the column (names
            those it has).
    """
    with named(path), path.open("rb") as raw:
        kind, stream, name = _looked_at(raw, path.name)
        yield from _read(str(path), kind, name, stream, text_column, separator)


def kind_of(path: Path) -> Kind:
    """What the bytes of a file are; NoText where they are no text."""
    with named(path), path.open("rb") as raw:
        return _looked_at(raw, path.name)[0]


def has_rows(path: Path, text_column: str) -> bool:
    """Whether a JSON file's first entry has the column: not every JSON file is a data set."""
    try:
        next(read_documents(path, text_column=text_column, separator="\0"), None)
    except UserError:
        return False
    return True


@contextmanager
def named(where: object) -> Iterator[None]:
    """Whatever a reader of bytes raises names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _BROKEN) and not type(error).__module__.startswith("pyarrow"):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {where}: {reason}; is it whole and readable?") from error


def _looked_at(raw: IO[bytes], name: str) -> tuple[Kind, io.BufferedReader, str]:
    """What the bytes are, a stream of them without compression, and the name without its ending."""
    stream, lower = _buffered(raw), name.lower()
    for _ in range(3):
        head = stream.peek(HEAD_BYTES)
        how = next((how for magic, how in _COMPRESSED.items() if head.startswith(magic)), None)
        ending = PurePosixPath(lower).suffix
        if how is None:
            break
        stream = _decompressed(stream, how)
        if _CLAIMS.get(ending) == how:
            lower = lower.removesuffix(ending) + (".tar" if ending == ".tgz" else "")
    kind = _kind(lower, head)
    claimed = _CLAIMS.get(PurePosixPath(lower).suffix)
    if claimed not in (None, kind) and head:
        raise UserError(
            f"cannot read {name}: by its name it is {claimed}, and by its bytes it is not; is it "
            "whole?"
        )
    return kind, stream, lower


def _buffered(stream: Any) -> io.BufferedReader:
    is_buffered = isinstance(stream, io.BufferedReader)
    return stream if is_buffered else io.BufferedReader(stream, 1 << 16)


def _decompressed(stream: IO[bytes], how: str) -> io.BufferedReader:
    if how == "zstandard":
        import pyarrow

        # Reads all frames and notices a truncated one; the zstandard package does neither unasked.
        return _buffered(pyarrow.input_stream(stream, compression="zstd"))
    opened: dict[str, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
    return _buffered(opened[how](stream))


def _kind(name: str, head: bytes) -> Kind:
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\3\4"):
        return "zip"
    if head[257:262] == b"ustar":
        return "tar"
    for magic, what in _OTHER.items():
        if head.startswith(magic):
            raise NoText(f"{name} is {what} and no text: give text, JSON, parquet or arrow")
    if head.startswith(_UTF_16):
        raise UserError(f"{name} is UTF-16: turn it into UTF-8 (iconv -f utf-16 -t utf-8) first")
    if b"\0" in head:
        raise NoText(f"{name} holds bytes that are no text: give text, JSON, parquet or arrow")
    if name.endswith((".md", ".py")):
        return "document"
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "json"
    is_json = not name.endswith(TEXT_SUFFIXES) and _is_object(head)
    return "json" if is_json else "text"


def _is_object(head: bytes) -> bool:
    """Whether text of an unknown name begins with a line that is a JSON object."""
    line = head.lstrip(_UTF_8_MARK).lstrip().split(b"\n")[0]
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read(
    where: str,
    kind: Kind,
    name: str,
    stream: io.BufferedReader,
    text_column: str,
    separator: str,
) -> Iterator[bytes]:
    """Documents of a stream of that kind."""
    if kind == "document":
        yield _without_mark(stream.read())
    elif kind == "text":
        yield from _split(where, stream, separator.encode())
    elif kind == "json":
        yield from _read_json(where, stream, text_column, is_lines=not name.endswith(".json"))
    elif kind in ("parquet", "arrow"):
        yield from _read_table(where, kind, stream, text_column)
    else:
        yield from _read_archive(where, kind, stream, text_column, separator)


def _read_archive(
    where: str, kind: Kind, stream: io.BufferedReader, text_column: str, separator: str
) -> Iterator[bytes]:
    """Documents of the files in it, by their names; what is hidden or holds no text is left out."""
    members = _tar_members(stream) if kind == "tar" else _zip_members(stream)
    for name, content in members:
        parts = PurePosixPath(name).parts
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        inside = f"{where}, {name}"
        with named(inside):
            try:
                one, opened, lower = _looked_at(content, parts[-1])
            except NoText:
                continue
            yield from _read(inside, one, lower, opened, text_column, separator)


def _tar_members(stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content


def _zip_members(stream: io.BufferedReader) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(_in_any_order(stream)) as archive:
        for member in sorted(archive.infolist(), key=lambda one: one.filename):
            if not member.is_dir():
                with archive.open(member) as content:
                    yield member.filename, content


def text_of_row(where: str, row: Any, text_column: str) -> Iterator[bytes]:
    """The bytes of one row's text, or nothing for a null.

    Raises:
        UserError: no such column (names those that are there), or the value is no text.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object but {type(row).__name__}")
    _check_column(where, text_column, row)
    text = row[text_column]
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(
            f"{where}: column {text_column!r} holds {type(text).__name__}, not text; name the "
            "column that holds text"
        )
    try:
        # Bytes that were invalid in the file come back as they were.
        yield text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; its bytes are kept and count as invalid.
        yield text.encode("utf-8", "surrogatepass")


def _check_column(where: str, text_column: str, columns: Iterable[str]) -> None:
    if text_column not in columns:
        names = ", ".join(map(repr, columns)) or "none"
        raise UserError(f"{where} has no column {text_column!r}; it has {names}")


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(_UTF_8_MARK)


def _split(where: str, stream: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Documents between separators; text in which there is none, in pieces of whole paragraphs."""
    lines: list[bytes] = []
    num_bytes, is_parted = 0, False
    for number, line in enumerate(stream):
        line = _without_mark(line) if number == 0 else line
        if line.rstrip(b"\r\n") == separator:
            yield b"".join(lines)
            lines, num_bytes, is_parted = [], 0, True
            continue
        lines.append(line)
        num_bytes += len(line)
        if num_bytes > MAX_DOCUMENT_BYTES and is_parted:
            raise UserError(
                f"{where}: no line {separator.decode()!r} within {MAX_DOCUMENT_BYTES >> 20} MiB; "
                "set `separator` to the line that parts its documents"
            )
        if num_bytes > MAX_WHOLE_BYTES and not is_parted:
            yield from _pieces(lines)
            lines, num_bytes = [], 0
    if is_parted or num_bytes <= 4 * PIECE_BYTES:
        yield b"".join(lines)
    else:
        yield from _pieces(lines)


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Whole paragraphs of `PIECE_BYTES` and more; of what has none, lines or words."""
    most = 4 * PIECE_BYTES
    piece = b""
    for line in lines:
        piece += line
        if len(piece) >= PIECE_BYTES and (not line.strip() or len(piece) >= most):
            while len(piece) > 2 * most:
                end = piece.rfind(b" ", 1, most) + 1 or most
                yield piece[:end]
                piece = piece[end:]
            yield piece
            piece = b""
    yield piece


def _read_json(
    where: str, stream: IO[bytes], text_column: str, *, is_lines: bool
) -> Iterator[bytes]:
    """One object a line; or a whole list, or an object with one, where the first line is none."""
    line = _without_mark(stream.readline())
    lines = [line]
    if not is_lines:
        following = stream.readline()
        try:
            row = _json(where, line)
        except UserError:
            row = None
        if not isinstance(row, dict) or not (following.strip() or text_column in row):
            yield from _read_whole_json(where, line + following + stream.read(), text_column)
            return
        lines = [line, following]
    for number, one in enumerate(itertools.chain(lines, stream), start=1):
        if one.strip():
            place = f"{where}, line {number}"
            yield from text_of_row(place, _json(place, one), text_column)


def _read_whole_json(where: str, data: bytes, text_column: str) -> Iterator[bytes]:
    found = _json(where, data)
    if isinstance(found, dict) and text_column not in found:
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        yield from text_of_row(f"{where}, entry {number}", row, text_column)


def _json(where: str, data: bytes) -> Any:
    """UserError where it is none, or nested so deep that Python's reader cannot follow."""
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        reason = getattr(error, "msg", None) or first_line(error)
    raise UserError(f"{where} is not JSON: {reason}")


def _in_any_order(stream: io.BufferedReader) -> IO[bytes]:
    """For libraries that begin at the end: a file as it is, anything else held in memory."""
    return stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(stream.read())


def _read_table(
    where: str, kind: Kind, stream: io.BufferedReader, text_column: str
) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        table = pyarrow.parquet.ParquetFile(_in_any_order(stream))
        names = table.schema_arrow.names
        batches = table.iter_batches(batch_size=256, columns=[text_column])
    elif stream.peek().startswith(b"ARROW1"):
        table = pyarrow.ipc.open_file(stream.read())
        names = table.schema.names
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(stream)
        names = batches.schema.names
    _check_column(where, text_column, names)
    for batch in batches:
        for value in batch.column(text_column).to_pylist():
            yield from text_of_row(where, {text_column: value}, text_column)
