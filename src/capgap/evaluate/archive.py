"""Files of an evaluation set: out of a folder, or out of an archive without unpacking it."""

import lzma
import tarfile
import zlib
from pathlib import Path

from capgap.archives import safe_members
from capgap.errors import UserError

ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar")


def find_copy(folder: Path, name: str) -> Path | None:
    """NAME/ or NAME.tar.xz (.tar.gz, .tgz, .tar.bz2, .tar) in the folder; None without either."""
    for path in (folder / name, *(folder / f"{name}{ending}" for ending in ARCHIVES)):
        if path.is_dir() if path.name == name else path.is_file():
            return path
    return None


def read_copy(path: Path) -> dict[str, bytes]:
    """The contents of all files by their path inside.

    UserError for an archive that is damaged, is refused by
    `capgap.archives.safe_members`.
    """
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
    try:
        with tarfile.open(path) as archive:
            return {name: file.read() for name, file in safe_members(archive)}
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the archive {path} ({cause}): get it again") from None
