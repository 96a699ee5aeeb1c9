"""One training step of an SAE: the selection of features, sparse products, the trainers, and the memory they need."""
