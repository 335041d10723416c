"""Fine-tuning: (backbone, Mask or none, task, data fraction, seed) -> result.json."""
