"""Errors a user can cause and mend."""


class UserError(Exception):
    """A mistake in what the user gave: one line with the wrong value and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
