"""Diagnosis of unhealthy SAEs: collects the evidence, finds the causes, and names the command that fixes each cause."""
