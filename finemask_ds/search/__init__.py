"""Search: each method is find_mask(config, run) -> Mask and reads as the paper."""
