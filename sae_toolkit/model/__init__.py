"""The language model: found by name, loaded, read at one hook or several, and replaced at one."""
