"""Training on streams of tasks: data sets, benchmarks, models, methods, metrics and run folders."""
