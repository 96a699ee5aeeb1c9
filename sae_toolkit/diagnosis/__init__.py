"""Why an SAE is unhealthy: the evidence, the causes that explain it, and the command that mends each."""
