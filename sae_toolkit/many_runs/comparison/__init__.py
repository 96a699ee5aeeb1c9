"""A comparison of libraries: each trains on the same activations, and one evaluation measures all SAEs."""
