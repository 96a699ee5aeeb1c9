"""Directories that are whole or absent, the Hub, the embedded model and text, and what files of others may do."""
