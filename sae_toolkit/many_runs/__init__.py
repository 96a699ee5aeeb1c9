"""What sweeps and comparisons share: processes, results on disk, a page."""
