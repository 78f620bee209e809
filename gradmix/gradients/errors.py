"""Moved to :mod:`gradmix.gradients.standard_errors`."""

from gradmix._moved import moved

__getattr__ = moved(__name__, "gradmix.gradients.standard_errors", {"standard_errors": "standard_errors"})
