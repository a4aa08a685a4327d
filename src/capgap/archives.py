"""Archives from elsewhere, read without leaving their folder."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from capgap.errors import UserError

# More than any set of benchmark data or texts; what unpacks to more is a trap or a mistake
MOST_BYTES = 2 << 30
MOST_MEMBERS = 1_000_000


def safe_members(
    archive: tarfile.TarFile, *, most_bytes: int = MOST_BYTES, most_members: int = MOST_MEMBERS
) -> Iterator[tuple[str, IO[bytes]]]:
    """The plain files of a tar archive, name by name, each open for reading until the next.

    Folders are passed over. UserError before the first is given where a name leads out of the
    archive, where a member is a link, a device or a pipe, where two have one name, and where the
    archive tells more bytes or files than that.
    """
    where = str(archive.name)
    files: dict[str, tarfile.TarInfo] = {}
    told = 0
    for number, member in enumerate(archive, 1):
        name = str(PurePosixPath(member.name))
        fault = _fault(member) or ("there twice" if name in files else None)
        if fault is not None:
            raise UserError(
                f"{where} is refused: its member {member.name!r} is {fault}; get it from "
                "its publisher"
            )
        told += member.size
        if told > most_bytes or number > most_members:
            raise UserError(
                f"{where} is refused: it unpacks to more than {most_bytes / (1 << 30):g} "
                f"GiB or {most_members:,} files"
            )
        if member.isreg():
            files[name] = member
    for name, member in files.items():
        # it ends at the size that was told, whatever is packed behind it
        stream = archive.extractfile(member)
        assert stream is not None, name
        with stream:
            yield name, stream


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused. A drive or a backslash is a path on Windows, and no honest archive
    needs them."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        return "outside of the archive"
    if parts and ":" in parts[0]:
        return "outside of the archive"
    if member.issym() or member.islnk():
        return "a link"
    return None if member.isreg() or member.isdir() else "a device or a pipe"
