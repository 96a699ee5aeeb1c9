"""Exceptions whose message is for the user and is shown in one line, without a traceback."""

from __future__ import annotations

import errno


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


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, in Python, in numpy, or in torch on any device."""
    return failed_allocation(error) is not None


def failed_allocation(error: BaseException) -> BaseException | None:
    """Returns the error of an allocation: `error` itself, or one that it was raised from; None if there is none.

    A `UserError` counts only if it was raised from one. A message that already tells the user what to do about the
    memory is raised `from None`.
    """
    import torch  # imported here because --help and a mistyped flag do not need it

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return cause
        # cuBLAS, cuDNN, the CPU's allocator and mmap raise other classes, and CUDA a torch.AcceleratorError.
        if not isinstance(cause, UserError) and any(words in str(cause).lower() for words in _OUT_OF_MEMORY):
            return cause
        cause = cause.__cause__
    return None


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# As pyarrow and safetensors quote the system, and as torch.save says it.
_NO_ROOM_WORDS = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter", "unexpected pos")


def is_disk_full(error: BaseException) -> bool:
    """Returns whether there was no room to write: on the disk, in a quota, or within the limit on a file's size."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        if not isinstance(cause, UserError) and any(words in str(cause).lower() for words in _NO_ROOM_WORDS):
            return True
        cause = cause.__cause__
    return False


def one_line(error: BaseException) -> str:
    """Returns the first 200 characters of an error's message as one line, to quote it in a message of this project."""
    return " ".join(str(error).split())[:200]
