"""Training on streams of tasks.

- :mod:`~gradmix.training.data`: data sets and samples; :mod:`~gradmix.training.streams`: streams of tasks, benchmarks.
- :mod:`~gradmix.training.methods`: the methods compared; :mod:`~gradmix.training.models`: the networks.
- :mod:`~gradmix.training.loop`: one run; :mod:`~gradmix.training.runs`: its result, experiments of many runs.
- :mod:`~gradmix.training.reports`: tables, plots and reports over runs.
"""

from gradmix.training import _former_modules

_former_modules.register()
