"""SAEBench's core metrics, computed here, and sae-bench itself, run in an environment of its own."""
