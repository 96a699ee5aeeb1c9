"""Reads the environment variables that torchrun sets for its processes, without importing torch."""

from __future__ import annotations

import os

# A rank whose collective operation fails puts this text into its message. The launcher looks for the text, because the
# rank that failed first has a better message.
RANK_IS_GONE = "another rank is gone"


def is_under_torchrun() -> bool:
    """Returns whether torchrun started this process. WORLD_SIZE does not show it: other launchers set it too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_in_environment() -> int:
    """Returns the rank that torchrun gave this process; 0 if torchrun did not start it."""
    return int(os.environ.get("RANK", 0)) if is_under_torchrun() else 0


def was_restarted() -> bool:
    """Returns whether torchrun started this process in place of one that failed (its --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
