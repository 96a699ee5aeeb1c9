"""The flags of every script as dataclasses: their types, defaults, help and checks."""
