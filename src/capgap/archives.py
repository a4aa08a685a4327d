"""Archives from elsewhere, unpacked without leaving their folder."""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from capgap.errors import UserError

# An archive of benchmark data or texts has megabytes; one that grows beyond this is a bomb
MOST_BYTES = 20 * 10**9
MOST_MEMBERS = 1_000_000


def safe_members(
    archive: tarfile.TarFile | zipfile.ZipFile,
    *,
    most_bytes: int = MOST_BYTES,
    most_members: int = MOST_MEMBERS,
) -> Iterator[tuple[str, IO[bytes]]]:
    """The plain files of an archive, name by name, each open for reading until the next.

    Folders are passed over. UserError before anything is yielded where a name leads out of the
    folder, where a member is a link, a device or encrypted, where two have one name, or where the
    sizes that the archive tells are too large.
    """
    where = str(archive.filename if isinstance(archive, zipfile.ZipFile) else archive.name)
    found = _zip_files(archive) if isinstance(archive, zipfile.ZipFile) else _tar_files(archive)
    files: dict[str, zipfile.ZipInfo | tarfile.TarInfo] = {}
    told = 0
    for name, member, size, refused in found:
        cause = refused or _refused_name(name) or ("is there twice" if name in files else None)
        if cause:
            raise UserError(f"{where}: {name!r} {cause}: the archive is not unpacked")
        files[name] = member
        told += size
        if told > most_bytes or len(files) > most_members:
            raise UserError(
                f"{where} holds more than {most_bytes:,} bytes or {most_members:,} files: it is "
                "not unpacked"
            )
    for name, member in files.items():
        # both readers end at the size that was told, whatever is packed behind it
        with _open_member(archive, member) as stream:
            yield name, stream


def open_archive(path: Path) -> tarfile.TarFile | zipfile.ZipFile:
    """UserError where it is neither a zip nor a tar file."""
    try:
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
        return tarfile.open(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is no zip or tar archive ({error})") from None


def _open_member(archive: Any, member: Any) -> IO[bytes]:
    if isinstance(archive, zipfile.ZipFile):
        return archive.open(member)
    opened: IO[bytes] = archive.extractfile(member)
    return opened


_Found = Iterator[tuple[str, zipfile.ZipInfo | tarfile.TarInfo, int, str | None]]


def _zip_files(archive: zipfile.ZipFile) -> _Found:
    for member in archive.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        refused = None
        if member.flag_bits & 1:
            refused = "is encrypted"
        elif kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            refused = "is a link or a device"
        if not member.is_dir() or refused or _refused_name(member.filename):
            yield member.filename, member, member.file_size, refused


def _tar_files(archive: tarfile.TarFile) -> _Found:
    for member in archive:
        refused = None if member.isreg() or member.isdir() else "is a link or a device"
        if not member.isdir() or _refused_name(member.name):
            yield member.name, member, member.size, refused


def _refused_name(name: str) -> str | None:
    """Why a name may lead out of the folder that it is unpacked in."""
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name:
        return "is no name of a file"
    # a drive or a backslash is a path on Windows, and no honest archive needs them
    if name.startswith("/") or "\\" in name or ":" in parts[0]:
        return "is an absolute path"
    if ".." in parts:
        return "leads out of its folder"
    return None
