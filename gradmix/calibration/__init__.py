"""Calibration: every kernel for a GPU is checked and timed on the user's device, and ``auto`` obeys what was found.

``gradmix calibrate`` measures, and keeps a table in the user's cache folder. The modules, from the bottom up:

- :mod:`~gradmix.calibration.key`: the device and the installation that a table is valid for.
- :mod:`~gradmix.calibration.verdicts`: measurements, and the rule that switches a kernel on or off at given sizes.
- :mod:`~gradmix.calibration.table`: the file.
- :mod:`~gradmix.calibration.lookup`: the answer that an operator gets when it chooses its implementation.
- :mod:`~gradmix.calibration.agreement`: the same answers in all processes that train one model.
- :mod:`~gradmix.calibration.cells`: what is measured. :mod:`~gradmix.calibration.problems`: its arguments and bounds.
- :mod:`~gradmix.calibration.measuring`: one measurement. :mod:`~gradmix.calibration.children`: those of an operator, in
  a process that may crash. :mod:`~gradmix.calibration.run`: all of them.
- :mod:`~gradmix.calibration.summary`: the table in words.

Operators import the look-up, and the upper half imports the operators.
"""
