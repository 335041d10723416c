"""Engines: one training loop over two backends, DeepSpeed ZeRO and a plain single process. Knows nothing of pruning."""
