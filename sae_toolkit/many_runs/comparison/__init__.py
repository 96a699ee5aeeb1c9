"""A comparison of libraries: each trains on the same activations, and all are evaluated alike."""
