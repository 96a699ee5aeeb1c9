"""What the scripts are made of: a package for each stage, in the order in which data flows (docs/code.md)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The clone, where the scripts and the environments lie."""
