"""One training step of an SAE: selection, sparse products, the trainers, and the memory that they take."""
