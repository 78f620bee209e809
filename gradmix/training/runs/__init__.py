"""Results of runs, their folders and metrics, and experiments of many runs."""
