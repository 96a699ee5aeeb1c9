"""k-sparse probing: how well a few features of an SAE tell two classes of text apart."""
