"""Time limits and retries of requests to the Hugging Face Hub. Importing this module sets the limits."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

from sae_toolkit.errors import UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before the second try; each later wait is twice as long. Tests set SAE_TOOLKIT_RETRY_WAIT.
_FIRST_WAIT = float(os.environ.get("SAE_TOOLKIT_RETRY_WAIT", "1"))
_N_TRIES = 6
_LONGEST_OUTAGE = 300.0  # no new try begins later than this many seconds after the first error

# Seconds that a request may wait. Requests without a limit of their own (the listing of files) would wait for ever.
_LONGEST_WAIT = 3.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


def _limit_wait(request: httpx2.Request) -> None:
    timeout = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        part: min(timeout.get(part) or _LONGEST_WAIT, _LONGEST_WAIT) for part in ("connect", "read", "write", "pool")
    }


def _client_with_limits() -> httpx2.Client:
    client = default_client_factory()
    client.event_hooks = {"request": [*client.event_hooks["request"], _limit_wait]}
    return client


set_client_factory(_client_with_limits)


class _Announcer(logging.Handler):
    """Logs the retries that huggingface_hub makes by itself, each as one line of this project's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = re.sub(r"\?\S*", "", " ".join(record.getMessage().split()))  # the query of a signed URL is a secret
        if " thrown while requesting " in message:
            self._reason = message
        elif message.startswith(("Retrying in", "Rate limited")):
            log.warning("%s: %s", self._reason or "the Hub", message)
        elif message.endswith("Trying to resume download..."):
            log.warning(message)


for _name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
    _library_log = logging.getLogger(_name)
    _library_log.setLevel(logging.WARNING)
    _library_log.propagate = False
    _library_log.addHandler(_Announcer())


class ConnectionFailed(UserError):
    """The connection failed at every try. `reason` is the last error, in one line."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what}: the connection fails ({reason}); run the same command again, which keeps the files that are"
            " already downloaded"
        )
        self.reason = reason


class Retries:
    """Waits between tries after connection errors, and gives up after the last try.

    Args:
        what: the flag and its value, for messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.reset()

    def reset(self) -> None:
        """Sets the count of failed tries to zero, after a success."""
        self._n_failed = 0
        self._since = time.monotonic()

    def wait_after(self, error: Exception) -> None:
        """Waits before another try.

        Raises:
            ConnectionFailed: that was the last try.
            Exception: `error` itself, if it is not a connection error, or if another try cannot help.
        """
        reason = connection_error(error)
        if reason is None:
            raise error
        if self._n_failed == 0:
            self._since = time.monotonic()
        self._n_failed += 1
        elapsed = time.monotonic() - self._since
        if self._n_failed == _N_TRIES or elapsed > _LONGEST_OUTAGE:
            tried = f"{reason}; tried {self._n_failed} times over {elapsed:.0f} s"
            raise ConnectionFailed(self.what, tried) from error
        wait = _FIRST_WAIT * 2 ** (self._n_failed - 1)
        log.warning("%s: %s; try %d of %d in %g s", self.what, reason, self._n_failed + 1, _N_TRIES, wait)
        time.sleep(wait)


def retrying(what: str, call: Callable[[], T]) -> T:
    """Calls a function, and again after each connection error. Returns the result.

    Args:
        what: the flag and its value, for messages.
        call: the function. Errors other than connection errors are passed on unchanged.

    Raises:
        ConnectionFailed: the connection failed at every try.
    """
    retries = Retries(what)
    while True:
        try:
            return call()
        except Exception as error:
            retries.wait_after(error)


def connection_error(error: BaseException) -> str | None:
    """Returns the connection error that caused an exception, in one line.

    Returns None if the cause is something else, or if the same request would fail again.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, (OfflineModeIsEnabled, UserError)):
            return None
        if isinstance(link, HfHubHTTPError):
            return one_line(link) if link.response.status_code in _TRANSIENT_STATUS else None
    for link in reversed(chain):
        if isinstance(link, (httpx2.TransportError, ConnectionError, TimeoutError)):
            return one_line(link) or type(link).__name__
    return None
