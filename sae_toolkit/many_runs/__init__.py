"""Sweeps over settings and comparisons of libraries, and what both need: processes, directories, tables, a page."""
