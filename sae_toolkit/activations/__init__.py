"""Rows of tokens to batches of activations: the stream, its shuffle buffer and the cache on disk."""
