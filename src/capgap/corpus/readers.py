"""Documents out of one file: plain text, text with separators, JSON lines, parquet; compressed."""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from capgap.errors import UserError

PLAIN_SUFFIXES = (".txt", ".md", ".py")
COMPRESSIONS = (".gz", ".zst", ".xz")
JSON_SUFFIXES = (".jsonl", *(f".jsonl{end}" for end in COMPRESSIONS))
SUFFIXES = (*PLAIN_SUFFIXES, *COMPRESSIONS, *JSON_SUFFIXES, ".parquet")

# A document is held in memory whole, so a file without separators must not be unlimited.
MAX_DOCUMENT_BYTES = 1 << 30


def read_documents(path: Path, *, text_column: str, separator: str) -> Iterator[bytes]:
    """Yield the documents of one file in order; the suffix decides how it is read.

    Markdown and Python files are one document each. Any other text is split at lines that hold
    the separator alone, so a text without such a line is one document. JSON lines and parquet
    give one document a row, from `text_column`; a row whose text is null gives none.

    Raises:
        UserError: the file cannot be read, is broken, or lacks the column (names those it has).
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, text_column)
        elif name.endswith(JSON_SUFFIXES):
            with _open_bytes(path) as stream:
                yield from _read_json_lines(path, stream, text_column)
        elif name.endswith((".md", ".py")):
            yield path.read_bytes()
        else:
            with _open_bytes(path) as stream:
                yield from _split_at_separator(path, stream, separator.encode())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; is it whole and readable?") from error


def text_of_row(row_text: object, *, where: str, text_column: str) -> bytes | None:
    """The bytes of one row's text, or None for a null.

    Raises:
        UserError: the value is no text.
    """
    if row_text is None:
        return None
    if not isinstance(row_text, str):
        raise UserError(
            f"{where}: column {text_column!r} holds {type(row_text).__name__}, not text; name the "
            "column that holds text"
        )
    try:
        # Bytes that were invalid in the file come back as they were.
        return row_text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; its bytes are kept and count as invalid.
        return row_text.encode("utf-8", "surrogatepass")


def missing_column(where: str, text_column: str, columns: list[str]) -> UserError:
    """The error for a column that is not there; names those that are."""
    return UserError(
        f"{where} has no column {text_column!r}; it has {', '.join(map(repr, columns)) or 'none'}"
    )


def _open_bytes(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if name.endswith(".xz"):
        return lzma.open(path, "rb")
    if name.endswith(".zst"):
        import pyarrow

        # Reads all frames and notices a truncated one; the zstandard package does neither unasked.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


def _split_at_separator(path: Path, stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    lines: list[bytes] = []
    num_bytes = 0
    for line in stream:
        if line.rstrip(b"\r\n") == separator:
            yield b"".join(lines)
            lines, num_bytes = [], 0
            continue
        lines.append(line)
        num_bytes += len(line)
        if num_bytes > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{path}: no line {separator.decode()!r} within {MAX_DOCUMENT_BYTES >> 20} MiB; "
                "set `separator` to the line that parts its documents"
            )
    yield b"".join(lines)


def _read_json_lines(path: Path, stream: IO[bytes], text_column: str) -> Iterator[bytes]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object but {type(row).__name__}")
        if text_column not in row:
            raise missing_column(where, text_column, list(row))
        text = text_of_row(row[text_column], where=where, text_column=text_column)
        if text is not None:
            yield text


def _read_parquet(path: Path, text_column: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_column not in table.schema_arrow.names:
                raise missing_column(str(path), text_column, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    text = text_of_row(value, where=str(path), text_column=text_column)
                    if text is not None:
                        yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from error
