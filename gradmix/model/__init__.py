"""The model in training: its inputs, its head, and forward passes that leave it unchanged."""
