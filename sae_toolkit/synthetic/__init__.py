"""Language models whose features are known: SAELens's synthetic models."""
