"""How rows of tokens become batches of activations: the stream, its shuffle buffer and the cache on disk."""
