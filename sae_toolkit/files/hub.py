"""Asks the Hugging Face Hub about a name before anything is downloaded, so that a refusal is one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import httpx2
from huggingface_hub import HfApi, ModelInfo, hf_hub_download, try_to_load_from_cache
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

# One file that every usable repository of the kind holds: found in the cache, the name works without a network.
_PROBE_FILE = {"model": "config.json", "dataset": "README.md"}
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer


@contextmanager
def _refusals_in_one_line(name: str, kind: Kind, flag: str) -> Iterator[None]:
    """What the Hub refuses for good, as a `UserError`."""
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
            f"{flag} {name}: no such {kind} on the Hugging Face Hub, and no file or directory of that name"
            " here (a private one needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError as error:
        raise UserError(f"{flag} {name}: no such revision on the Hugging Face Hub: {one_line(error)}") from None


def _in_cache(name: str, kind: Kind, revision: str | None = None) -> bool:
    return isinstance(try_to_load_from_cache(name, _PROBE_FILE[kind], repo_type=kind, revision=revision), str)


def check_repository(name: str, kind: Kind, flag: str) -> str:
    """Checks that a repository exists and may be read, and returns its present name.

    The Hub redirects old names (`wikitext` is `Salesforce/wikitext` today); its libraries no longer
    accept them everywhere, so the redirect is followed here, once.

    Args:
        name: repository id, such as `meta-llama/Meta-Llama-3-8B`.
        kind: what it is a repository of.
        flag: the flag that named it, for the message.

    Raises:
        UserError: the name is malformed or unknown, the repository is gated, or the Hub cannot be
            reached and nothing of the repository is in the local cache.
    """
    api = HfApi()

    def ask() -> str:
        try:
            info = (api.model_info if kind == "model" else api.dataset_info)(name)
            api.auth_check(info.id, repo_type=kind)
            return info.id
        except httpx2.ConnectError:
            if _in_cache(name, kind):  # a machine without a network need not wait for one
                return name
            raise

    try:
        with _refusals_in_one_line(name, kind, flag):
            return retrying(f"{flag} {name}", ask)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionFailed) as error:
        if _in_cache(name, kind):
            return name
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise UserError(
                f"{flag} {name}: the Hugging Face Hub refuses the token; log in anew (`hf auth login`, or HF_TOKEN)"
            ) from None
        reason = error.reason if isinstance(error, ConnectionFailed) else one_line(error)
        raise UserError(
            f"{flag} {name}: the Hugging Face Hub cannot be reached ({reason}) and the {kind} is not in the"
            " local cache; connect, or name a local path or one of the embedded defaults"
            " (embedded:smollm2-135m, embedded:wikipedia)"
        ) from None


def download_small_files(name: str, revision: str | None, subfolder: str, flag: str) -> str | None:
    """Downloads a model's configuration and tokenizer, every file whole, and returns the commit they are of.

    Transformers takes a file that it could not fetch for one that does not exist, and then makes a tokenizer without
    it; asked for this commit, it finds all there are in the cache.

    Returns:
        The commit; None where the Hub cannot be reached and the cache is all there is.

    Raises:
        UserError: there is no such revision, or the connection kept failing.
    """
    api = HfApi()

    def ask() -> ModelInfo | None:
        try:
            return api.model_info(name, revision=revision)
        except httpx2.ConnectError:
            if _in_cache(name, "model", revision):
                return None
            raise

    def download(info: ModelInfo) -> None:
        for file in info.siblings or ():
            folder, _, filename = file.rfilename.rpartition("/")
            if folder == subfolder and filename.endswith(_SMALL_FILES):
                hf_hub_download(name, file.rfilename, revision=info.sha)

    with _refusals_in_one_line(name, "model", flag):
        try:
            info = retrying(f"{flag} {name}", ask)
        except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionFailed):
            if not _in_cache(name, "model", revision):
                raise
            info = None
        if info is None:
            return None
        retrying(f"{flag} {name}", lambda: download(info))
        return info.sha
