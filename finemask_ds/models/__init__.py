"""Models: the only place that knows layer names and the only importer of transformers."""
