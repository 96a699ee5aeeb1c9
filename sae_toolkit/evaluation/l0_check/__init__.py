"""What the decoders of SAEs say about their L0: arXiv 2508.16560 (Chanin and Garriga-Alonso, "Sparse but Wrong")."""
