"""One training run: steps, samplers, checkpoints, evaluation, several processes."""
