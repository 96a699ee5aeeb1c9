"""What an SAE finds of the features of a synthetic model, which are known: SynthSAEBench (arXiv 2602.14687)."""
