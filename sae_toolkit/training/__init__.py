"""Training runs: how one is prepared, checked, trained to the end, saved and resumed."""
