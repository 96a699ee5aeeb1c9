"""SAEs measured on real activations: the metrics, their intervals and the verdict."""
