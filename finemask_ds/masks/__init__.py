"""Masks: what they are, how they are selected, binarized, scheduled and stored. No model, no data, no distribution."""
