"""Diagnosis of unhealthy SAEs: the evidence, the causes that it shows, and the command that mends each cause."""
