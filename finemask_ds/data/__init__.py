"""Text and tasks: corpora as memory-mapped token blocks, and the built-in language."""
