"""The connection to the Hub: how long a request may wait, and how often it is made again when it fails."""

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

# Waits between tries, in seconds: first, first x 2, ...; SAE_TOOLKIT_RETRY_WAIT is for tests.
_FIRST_WAIT = float(os.environ.get("SAE_TOOLKIT_RETRY_WAIT", "1"))
_N_TRIES = 6
_LONGEST_OUTAGE = 300.0  # seconds after which no new try begins, however long each took

# A request that names no time limit (the listing of files) would wait for ever; others may wait no longer than this.
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
    """Says in this project's log, a line each, what huggingface_hub's own retries of a request wait for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = re.sub(r"\?\S*", "", " ".join(record.getMessage().split()))  # a signed address is a key
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
    """The connection failed at every try."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what}: the connection fails ({reason}); the same command, given again, keeps the files that are"
            " already downloaded"
        )
        self.reason = reason


class Retries:
    """Tries in a row after errors of the connection, further and further apart.

    Args:
        what: the flag and the name that the errors are about, for messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.reset()

    def reset(self) -> None:
        """Something came through: the next error is the first again."""
        self._n_failed = 0
        self._since = time.monotonic()

    def wait_after(self, error: Exception) -> None:
        """Waits before another try.

        Raises:
            ConnectionFailed: that was the last.
            Exception: `error` itself, where another try would end the same.
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
    """The result of a call, which is made again when the connection fails; errors of other kinds are raised.

    Raises:
        ConnectionFailed: at every try.
    """
    retries = Retries(what)
    while True:
        try:
            return call()
        except Exception as error:
            retries.wait_after(error)


def connection_error(error: BaseException) -> str | None:
    """What the connection failed with, if that is at the bottom of an exception and may pass; else None."""
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
