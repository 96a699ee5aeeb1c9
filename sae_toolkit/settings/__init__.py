"""Settings of all scripts as dataclasses, whose fields are the flags: types, defaults, help and checks."""
