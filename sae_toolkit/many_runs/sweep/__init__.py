"""A sweep over settings: its trials, run on Ray Tune, and its report."""
