"""How long a test waits for what must come: it ends a hang, and no machine is so loaded that it misses it."""

PATIENCE = 3600.0
"""Seconds."""
