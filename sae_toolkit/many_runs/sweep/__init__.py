"""A sweep over settings: its trials, their run on Ray Tune, and the report."""
