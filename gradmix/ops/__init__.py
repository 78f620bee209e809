"""The operators: one file each, holding its reference, its fast bodies, its registration and its dispatch."""
