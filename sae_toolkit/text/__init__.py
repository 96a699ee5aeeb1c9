"""From the name of a data set to rows of token ids, and the choice of documents and positions to use."""
