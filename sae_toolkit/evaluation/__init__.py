"""Evaluation of SAEs on real activations: the metrics, their confidence intervals and the verdict."""
