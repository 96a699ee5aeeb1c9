"""Sweeps over settings, comparisons of libraries, and the code for both: processes, directories, tables, a page."""
