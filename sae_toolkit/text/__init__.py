"""The text: opening a data set by name, packing documents into rows of token ids, and choosing what is trained on."""
