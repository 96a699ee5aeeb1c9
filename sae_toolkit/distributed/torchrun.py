"""What torchrun says of this process, read without importing torch."""

from __future__ import annotations

import os


def is_under_torchrun() -> bool:
    """Whether torchrun started this process; others set WORLD_SIZE and RANK too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank_in_environment() -> int:
    """The rank that torchrun gave this process; 0 where it did not start it."""
    return int(os.environ.get("RANK", 0)) if is_under_torchrun() else 0


def was_restarted() -> bool:
    """Whether torchrun started this process in place of one that failed (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
