"""Errors a user can cause and mend."""

import errno


class UserError(Exception):
    """A mistake in what the user gave: one line with the wrong value and the fix.

    The command line prints it without a traceback and exits with code 2. `rank`: of the process
    that met it, where several work together; None where all meet the same.
    """

    rank: int | None = None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full.

    safetensors, tokenizers and shutil.copytree tell it in words alone.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)
