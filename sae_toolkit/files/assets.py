"""Where what was made once is kept, in Hugging Face's cache."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from sae_toolkit.errors import one_line
from sae_toolkit.files.whole_directory import NotSaved, is_about, whole_directory

log = logging.getLogger(__name__)


def assets(*parts: str) -> Path:
    """Returns a directory of this project in Hugging Face's cache (HF_HOME). It may not exist yet.

    huggingface_hub's `cached_assets_path` would make it, and raise where it cannot.
    """
    return Path(constants.HF_ASSETS_CACHE, "sae_toolkit", *parts)


def kept_directory(directory: Path, what: str, about: dict[str, Any], make: Callable[[Path], None]) -> Path | None:
    """Makes a directory if it is not there yet, damaged, or about something else. Processes wait for one another.

    Args:
        directory: the directory.
        what: what is in it, for messages.
        about: what its content follows from, as JSON values.
        make: writes the content into the directory that it is given.

    Returns:
        The directory; None, with a warning, if it cannot be kept there.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f"{directory.name}.lock")):
            if not is_about(directory, about):
                log.info("making %s once, in %s", what, directory)
                if directory.exists():  # `whole_directory` would keep one that has no manifest
                    shutil.rmtree(directory)
                with whole_directory(directory, about=about) as partial:
                    make(partial)
    except (NotSaved, OSError) as error:
        log.warning(
            "%s: %s cannot be kept there (%s), so that each start takes longer; set HF_HOME",
            *(directory.parent, what, one_line(error)),
        )
        return None
    return directory
