"""SAEs on disk: finding them by name, loading them from three libraries' formats, and saving checkpoints."""
