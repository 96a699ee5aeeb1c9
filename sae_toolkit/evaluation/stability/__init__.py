"""Stability: whether other SAEs of the same hook have the same features."""
