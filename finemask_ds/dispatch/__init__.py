"""Cells of fine-tuning, planned once and run wherever there is room; never imports torch."""
