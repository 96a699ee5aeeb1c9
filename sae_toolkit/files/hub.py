"""Checks a name on the Hugging Face Hub before anything is downloaded, and turns refusals into one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import ConnectionFailed, retrying

Kind = Literal["model", "dataset"]
T = TypeVar("T")

# Every usable repository has one of these files. If the local cache has it, the repository can be used offline.
_PROBE_FILES = {"model": ("config.json", "adapter_config.json"), "dataset": ("README.md",)}
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer


@contextmanager
def _refusals_in_one_line(name: str, kind: Kind, flag: str) -> Iterator[None]:
    """Context manager that turns the Hub's permanent refusals into a `UserError`."""
    try:
        yield
    except HFValidationError:
        raise UserError(f"{flag} {name}: neither a file or directory here nor a Hugging Face id (owner/name)") from None
    except GatedRepoError:
        raise UserError(
            f"{flag} {name}: this {kind} is gated; accept its licence on its Hugging Face page, then run"
            " `hf auth login` (or set HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{flag} {name}: no such {kind} on the Hugging Face Hub, and no file or directory of that name here;"
            " check the name, or run `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError as error:
        raise UserError(f"{flag} {name}: no such revision on the Hugging Face Hub: {one_line(error)}") from None


def _ask(name: str, kind: Kind, flag: str, revision: str | None, request: Callable[[], T]) -> T | None:
    """Returns the Hub's answer to a request, or None if it cannot be reached and the local cache has the repository.

    Raises:
        UserError: the Hub refuses the name or the token, or it cannot be reached and the cache has nothing.
    """

    def is_in_cache() -> bool:
        cached = (try_to_load_from_cache(name, file, repo_type=kind, revision=revision) for file in _PROBE_FILES[kind])
        return any(isinstance(file, str) for file in cached)

    def request_unless_offline() -> T | None:
        try:
            return request()
        except httpx2.ConnectError:
            if is_in_cache():  # a machine without a network need not wait for the retries
                return None
            raise

    try:
        with _refusals_in_one_line(name, kind, flag):
            return retrying(f"{flag} {name}", request_unless_offline)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionFailed) as error:
        if is_in_cache():
            return None
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise UserError(
                f"{flag} {name}: the Hugging Face Hub refuses the token; log in again (`hf auth login`, or HF_TOKEN)"
            ) from None
        reason = error.reason if isinstance(error, ConnectionFailed) else one_line(error)
        missing = f"revision {revision} of the {kind}" if revision else f"the {kind}"
        raise UserError(
            f"{flag} {name}: the Hugging Face Hub cannot be reached ({reason}) and {missing} is not in the"
            " local cache; connect, or name a local path or one of the embedded defaults"
            " (embedded:smollm2-135m, embedded:wikipedia)"
        ) from None


def check_repository(name: str, kind: Kind, flag: str) -> str:
    """Checks that a repository exists and may be read, and returns its present name.

    The Hub redirects old names (`wikitext` is `Salesforce/wikitext` today). The Hub's libraries no longer accept old
    names everywhere, so the present name is looked up here.

    Args:
        name: repository id, such as `meta-llama/Meta-Llama-3-8B`.
        kind: kind of the repository.
        flag: the flag that named it, for messages.

    Raises:
        UserError: the name is malformed or unknown, the repository is gated, or the Hub cannot be
            reached and nothing of the repository is in the local cache.
    """
    api = HfApi()

    def present_name() -> str:
        info = api.repo_info(name, repo_type=kind)
        api.auth_check(info.id, repo_type=kind)
        return info.id

    return _ask(name, kind, flag, None, present_name) or name


def download_small_files(name: str, revision: str | None, subfolder: str, flag: str) -> str | None:
    """Downloads a model's configuration and tokenizer files, and returns the commit that they belong to.

    If a download fails, Transformers behaves as if the file did not exist, and makes a tokenizer without it. Called
    with the commit that is returned here, it finds every file in the cache.

    Returns:
        The commit; None if the Hub cannot be reached and the files come from the cache.

    Raises:
        UserError: there is no such revision, or the connection kept failing.
    """
    info = _ask(name, "model", flag, revision, lambda: HfApi().model_info(name, revision=revision))
    if info is None:
        return None

    def download() -> None:
        for file in info.siblings or ():
            folder, _, filename = file.rfilename.rpartition("/")
            if folder == subfolder and filename.endswith(_SMALL_FILES):
                hf_hub_download(name, file.rfilename, revision=info.sha)

    with _refusals_in_one_line(name, "model", flag):
        retrying(f"{flag} {name}", download)
    return info.sha
