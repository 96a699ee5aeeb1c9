"""The language model: finding it by name, loading it, and reading or replacing its activations at a hook."""
