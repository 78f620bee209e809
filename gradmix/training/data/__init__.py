"""Data sets: their files, samples that are read by index, augmentation, batches read by worker processes."""
