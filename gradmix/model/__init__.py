"""The model in training: its inputs, its head, its forward passes, and how it is left unchanged."""
