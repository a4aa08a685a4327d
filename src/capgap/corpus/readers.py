"""Documents of one file, by its bytes: text, JSON, parquet, arrow; compressed, in archives.

Libraries that read whole tables of text (datasets, pandas) refuse bytes that are not UTF-8; here
none is lost.
"""

import io
import itertools
import json
import lzma
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from capgap.errors import UserError, border, first_line

# What a folder's files are called; a file or glob that is named may be called anything
TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = tuple(
    suffix + end
    for suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet", ".arrow", ".tar", ".tgz", ".zip")
    for end in ("", ".gz", ".zst", ".xz", ".bz2")
)

# A document is held in memory whole, so a file without separators must not be unlimited
MAX_DOCUMENT_BYTES = 1 << 30
# So far a text is read on for a separator
MAX_WHOLE_BYTES = 1 << 26
# Text without any separator is cut at the first empty line behind so many bytes, at the first line
# or white space behind four times as many
PIECE_BYTES = 1 << 14
HEAD_BYTES = 1 << 12
# More than any set of benchmark data; an archive that unpacks to more is a trap or a mistake
MOST_BYTES = 2 << 30
MOST_MEMBERS = 1_000_000
UTF_8_MARK = b"\xef\xbb\xbf"
# By the first bytes; compressions as pyarrow calls them
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
}
KINDS = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"PK\3\4": "zip",
    b"%PDF": "PDF", b"\x89PNG": "PNG", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
# What a name says of the bytes; anything else may hold anything
CLAIMS = {
    ".gz": "gzip", ".tgz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bz2",
    ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar", ".zip": "zip",
}  # fmt: skip


class NoText(UserError):
    """A file that holds no text; who reads a folder may leave it out."""


class Opened(NamedTuple):
    """A stream without compression, and its name in lower case without the compression's ending."""

    kind: str
    name: str
    stream: io.BufferedReader


def read_documents(path: Path, *, text_column: str, separator: str) -> Iterator[bytes]:
    """Yield the documents of one file in order; its first bytes decide how it is read.

    Markdown and Python files are one document each, and with an empty separator all text files.
    Any other text is split at lines that hold the separator alone; one of many paragraphs without
    such a line is cut into pieces between paragraphs. JSON (a list of objects, or one a line),
    parquet and arrow give one document a row, from `text_column`; a row whose text is null gives
    none. Archives give those of their files.

    Raises:
        UserError: the file cannot be read, is broken, holds no text, or lacks the column (names
            those it has).
    """
    with named(path), path.open("rb") as raw:
        yield from _read(str(path), _opened(raw, path.name), text_column, separator)


def kind_of(path: Path) -> str:
    """What a file holds by its bytes: text, document, json, parquet, arrow, tar or zip; NoText
    where it is none of them."""
    with named(path), path.open("rb") as raw:
        return _opened(raw, path.name).kind


def has_rows(path: Path, text_column: str) -> bool:
    """Whether a JSON file's first entry has the column: not every JSON file is a data set."""
    with suppress(UserError):
        next(read_documents(path, text_column=text_column, separator="\0"), None)
        return True
    return False


def named(where: object) -> AbstractContextManager[None]:
    """Whatever a reader of bytes raises names the file."""
    return border(f"cannot read {where} (is it whole and readable?)")


def _opened(raw: IO[bytes], name: str) -> Opened:
    stream, name = _buffered(raw), name.lower()
    for _ in range(3):
        head = stream.peek(HEAD_BYTES)
        how = next((how for magic, how in COMPRESSIONS.items() if head.startswith(magic)), None)
        if how is None:
            break
        import pyarrow

        # both read all members and notice a truncated one
        unpack: Any = lzma.open if how == "xz" else partial(pyarrow.input_stream, compression=how)
        stream = _buffered(unpack(stream))
        ending = PurePosixPath(name).suffix
        if CLAIMS.get(ending) == how:
            name = name.removesuffix(ending) + (".tar" if ending == ".tgz" else "")
    kind = _kind(name, head)
    claimed = CLAIMS.get(PurePosixPath(name).suffix, kind)
    if head and claimed != kind:
        raise UserError(
            f"cannot read {name}: by its name it is {claimed}, by its bytes {kind}; is it whole?"
        )
    return Opened(kind, name, stream)


def _buffered(stream: Any) -> io.BufferedReader:
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, 1 << 16)


def _kind(name: str, head: bytes) -> str:
    kind = next((kind for magic, kind in KINDS.items() if head.startswith(magic)), None)
    if kind == "UTF-16":
        raise UserError(f"{name} is UTF-16: turn it into UTF-8 (iconv -f utf-16 -t utf-8) first")
    if head[257:262] == b"ustar":
        return "tar"
    if kind in ("PDF", "PNG") or (kind is None and b"\0" in head):
        raise NoText(f"{name} is {kind or 'binary'} and no text: give text, JSON, parquet or arrow")
    if kind is not None:
        return kind
    if name.endswith((".md", ".py")):
        return "document"
    if name.endswith(JSON_SUFFIXES):
        return "json"
    line = head.removeprefix(UTF_8_MARK).lstrip().split(b"\n")[0]
    is_text = name.endswith(TEXT_SUFFIXES) or _object(line) is None
    return "text" if is_text else "json"


def _object(line: bytes) -> dict[str, Any] | None:
    """What a line says that is a JSON object; None for any other."""
    try:
        content = _json("", line)
    except UserError:
        return None
    return content if isinstance(content, dict) else None


def _read(where: str, opened: Opened, text_column: str, separator: str) -> Iterator[bytes]:
    kind, name, stream = opened
    if kind == "document":
        yield stream.read().removeprefix(UTF_8_MARK)
    elif kind == "text":
        yield from _split(where, stream, separator.encode())
    elif kind == "json":
        for label, row in _json_rows(where, stream, text_column, is_list=name.endswith(".json")):
            yield from text_of_row(label, row, text_column)
    elif kind in ("parquet", "arrow"):
        for row in _table_rows(kind, stream, text_column):
            yield from text_of_row(where, row, text_column)
    else:
        for member, content in _members(kind, stream):
            parts = PurePosixPath(member).parts
            if any(part.startswith((".", "__MACOSX")) for part in parts):
                continue
            inside = f"{where}, {member}"
            with named(inside):
                try:
                    opened = _opened(content, parts[-1])
                except NoText:
                    continue
                yield from _read(inside, opened, text_column, separator)


def _members(kind: str, stream: io.BufferedReader) -> Iterator[tuple[str, IO[bytes]]]:
    """The plain files of an archive: of a tar as they lie there, of a zip by their names."""
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content
        return
    with zipfile.ZipFile(_in_any_order(stream)) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                with archive.open(name) as content:
                    yield name, content


def _in_any_order(stream: io.BufferedReader) -> IO[bytes]:
    """For libraries that begin at the end: a file as it is, anything else held in memory."""
    return stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(stream.read())


def text_of_row(where: str, row: Any, text_column: str) -> Iterator[bytes]:
    """The bytes of one row's text, or nothing for a null; UserError: no such column (names those
    that are there), or the value is no text."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object but {type(row).__name__}")
    if text_column not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where} has no column {text_column!r}; it has {names}")
    text = row[text_column]
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(
            f"{where}: column {text_column!r} holds {type(text).__name__}, not text; name the "
            "column that holds text"
        )
    try:
        # bytes that were invalid in the file come back as they were
        yield text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; its bytes are kept and count as invalid
        yield text.encode("utf-8", "surrogatepass")


def _split(where: str, stream: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Documents between separators; text in which there is none, in pieces of whole paragraphs;
    with an empty separator the whole text."""
    lines: list[bytes] = []
    num_bytes, is_parted = 0, not separator
    for number, line in enumerate(stream):
        line = line if number else line.removeprefix(UTF_8_MARK)
        if separator and line.rstrip(b"\r\n") == separator:
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


def _json_rows(
    where: str, stream: IO[bytes], text_column: str, *, is_list: bool
) -> Iterator[tuple[str, Any]]:
    """Rows and what to call them: one a line, or, where it may be one and the first line is no row,
    the entries of a list or of an object's only list."""
    line, following = stream.readline().removeprefix(UTF_8_MARK), stream.readline()
    row = _object(line)
    if not is_list or (row is not None and (following.strip() or text_column in row)):
        for number, one in enumerate(itertools.chain([line, following], stream), start=1):
            if one.strip():
                label = f"{where}, line {number}"
                yield label, _json(label, one)
        return
    content = _json(where, line + following + stream.read())
    if isinstance(content, dict) and text_column not in content:
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f"{where}, entry {number}", row


def _json(where: str, data: bytes) -> Any:
    """UserError where it is none, or nested so deep that Python's reader cannot follow."""
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        reason = getattr(error, "msg", None) or first_line(error)
    raise UserError(f"{where} is not JSON: {reason}")


def _table_rows(kind: str, stream: io.BufferedReader, text_column: str) -> Iterator[dict[str, Any]]:
    """The column's value of every row; where there is none, the names of those that are there."""
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
    if text_column not in names:
        yield dict.fromkeys(names)
        return
    for batch in batches:
        for value in batch.column(text_column).to_pylist():
            yield {text_column: value}


def safe_members(
    archive: tarfile.TarFile, *, most_bytes: int = MOST_BYTES, most_members: int = MOST_MEMBERS
) -> Iterator[tuple[str, IO[bytes]]]:
    """The plain files of a tar archive, name by name, each open for reading until the next.

    Folders are passed over. UserError before the first is given where a name leads out of the
    archive, where a member is a link, a device or a pipe, where two have one name, and where the
    archive tells more bytes or files than that (docs/security.md#archives).
    """
    files: dict[str, tarfile.TarInfo] = {}
    size = 0
    for number, member in enumerate(archive, 1):
        path = PurePosixPath(member.name)
        # a drive or a backslash is a path on Windows, and no honest archive needs them
        is_outside = path.is_absolute() or ".." in path.parts or "\\" in member.name
        faults = {
            "outside of the archive": is_outside or ":" in "".join(path.parts[:1]),
            "a link": member.issym() or member.islnk(),
            "a device or a pipe": not (member.isreg() or member.isdir()),
            "there twice": str(path) in files,
        }
        for fault, is_so in faults.items():
            if is_so:
                raise UserError(
                    f"{archive.name!s} is refused: its member {member.name!r} is {fault}; get it "
                    "from its publisher"
                )
        size += member.size
        if size > most_bytes or number > most_members:
            raise UserError(
                f"{archive.name!s} is refused: it unpacks to more than {most_bytes / (1 << 30):g} "
                f"GiB or {most_members:,} files"
            )
        if member.isreg():
            files[str(path)] = member
    for name, member in files.items():
        # it ends at the size that was told, whatever is packed behind it
        stream = archive.extractfile(member)
        assert stream is not None, name
        with stream:
            yield name, stream
