"""What the tests of inspect_sae_features.py share."""

CONTEXT = 64
FLAGS = ("--tokens", "8000", "--lm_dtype", "float32", "--device", "cpu", "--examples", "4", "--drawn_examples", "3")
