"""What features mean in the words of a language model, and how well these words tell where a feature fires."""

FILENAME = "explanations.parquet"
