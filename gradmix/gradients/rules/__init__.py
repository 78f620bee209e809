"""Layer rules: see :mod:`gradmix.gradients.rules.base`."""
