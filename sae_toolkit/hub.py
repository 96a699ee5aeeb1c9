"""Asks the Hugging Face Hub about a name before anything is downloaded, so that a refusal is one clear line."""

from __future__ import annotations

from typing import Literal

import httpx2
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from sae_toolkit.errors import UserError, one_line

# One file that every usable repository of the kind holds: found in the cache, the name works without a network.
_PROBE_FILE = {"model": "config.json", "dataset": "README.md"}


def check_repository(name: str, kind: Literal["model", "dataset"], flag: str) -> str:
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
    try:
        info = (api.model_info if kind == "model" else api.dataset_info)(name, timeout=30)
        api.auth_check(info.id, repo_type=kind)
        return info.id
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
    except (OfflineModeIsEnabled, httpx2.TransportError, HfHubHTTPError) as error:
        if isinstance(try_to_load_from_cache(name, _PROBE_FILE[kind], repo_type=kind), str):
            return name
        reason = one_line(error)
        raise UserError(
            f"{flag} {name}: the Hugging Face Hub cannot be reached ({reason}) and the {kind} is not in the"
            " local cache; connect, or name a local path or one of the embedded defaults"
            " (embedded:smollm2-135m, embedded:wikipedia)"
        ) from None
