"""Exceptions whose message is for the user and is shown in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line: the flag or file, the value found, what is wrong and what to do. Scripts print it without
    a traceback and exit with status 2. Any other exception is a bug, and its traceback is shown.
    """

    exit_status = 2

    def __str__(self) -> str:
        """Returns the message on one line: line breaks and control characters in values are escaped."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class RunFailed(UserError):
    """A run that cannot go on although its flags are right. Also shown in one line; the exit status is 1."""

    exit_status = 1


def one_line(error: Exception) -> str:
    """Returns the first 200 characters of an error's message as one line, to quote it in a message of this project."""
    return " ".join(str(error).split())[:200]
