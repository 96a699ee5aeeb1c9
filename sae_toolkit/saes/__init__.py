"""SAEs on disk: found by name, loaded from any library's format, and saved as checkpoints."""
