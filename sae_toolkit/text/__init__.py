"""Text by name, as documents, records and rows of tokens; which documents are held out."""
