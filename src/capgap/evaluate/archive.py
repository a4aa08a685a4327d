"""Files of an evaluation set: out of a folder, or out of an archive without unpacking it."""

import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from capgap.errors import UserError

ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar")
# More than any of the sets; an archive that unpacks to more is a trap or a mistake
MOST_BYTES = 2 << 30


def find_copy(folder: Path, name: str) -> Path | None:
    """NAME/ or NAME.tar.xz (.tar.gz, .tgz, .tar.bz2, .tar) in the folder; None without either."""
    for path in (folder / name, *(folder / f"{name}{ending}" for ending in ARCHIVES)):
        if path.is_dir() if path.name == name else path.is_file():
            return path
    return None


def read_copy(path: Path) -> dict[str, bytes]:
    """The contents of all files by their path inside.

    UserError for an archive that is damaged, unpacks to more than MOST_BYTES, or has a member that
    would lie outside of it, is a link or a device.
    """
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
    try:
        with tarfile.open(path) as archive:
            return _members(path, archive)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the archive {path} ({cause}): get it again") from None


def _members(path: Path, archive: tarfile.TarFile) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    total = 0
    for member in archive:
        fault = _fault(member)
        if fault is not None:
            raise UserError(
                f"{path} is refused: its member {member.name!r} is {fault}; get the set from its "
                "publisher"
            )
        if member.isdir():
            continue
        total += member.size
        if total > MOST_BYTES:
            raise UserError(f"{path} is refused: it unpacks to more than {MOST_BYTES >> 30} GiB")
        stream = archive.extractfile(member)
        assert stream is not None, member.name
        found[str(PurePosixPath(member.name))] = stream.read()
    return found


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused."""
    place = PurePosixPath(member.name)
    if place.is_absolute() or ".." in place.parts:
        return "outside of the archive"
    if member.issym() or member.islnk():
        return "a link"
    return None if member.isreg() or member.isdir() else "a device or a pipe"
