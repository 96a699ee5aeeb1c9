"""SAEBench's core metrics under their own names, and sae-bench itself in its own environment."""
