"""The source document's import paths."""
