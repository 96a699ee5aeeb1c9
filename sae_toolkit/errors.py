"""The one exception that is for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """A mistake its reader can mend.

    The message is one line: the flag or file, what was found there, and what to do. Scripts print it
    without a traceback and exit with status 2. Anything else that is raised is a bug and keeps its
    traceback.
    """

    exit_status = 2

    def __str__(self) -> str:
        """The message with line breaks and control characters, which values may hold, written out."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class RunFailed(UserError):
    """A run that cannot go on, through no mistake in its flags: in one line as well, with exit status 1."""

    exit_status = 1


def one_line(error: Exception) -> str:
    """The beginning of another library's message, for a line of ours."""
    return " ".join(str(error).split())[:200]
