"""Fine-tuning: (backbone, Mask or none, task, number of training rows, seed) -> result.json."""
