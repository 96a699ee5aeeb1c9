"""What torchrun tells this process in its environment, read without importing torch."""

from __future__ import annotations

import os

# A rank says this of the others when a collective operation fails; the launcher looks for it, as the rank whose failure
# came first has a better message.
RANK_IS_GONE = "another rank is gone"


def is_under_torchrun() -> bool:
    """Returns whether torchrun started this process. WORLD_SIZE and RANK do not tell: other launchers set them too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_in_environment() -> int:
    """Returns the rank that torchrun gave this process; 0 if torchrun did not start it."""
    return int(os.environ.get("RANK", 0)) if is_under_torchrun() else 0


def was_restarted() -> bool:
    """Returns whether torchrun started this process in place of one that failed (its --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
