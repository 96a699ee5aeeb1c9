"""What the scripts show: log lines, progress, errors in one line, and the signals that stop a run."""
