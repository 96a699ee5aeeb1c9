"""A training run: prepared and checked, driven to its end, saved and resumed."""
