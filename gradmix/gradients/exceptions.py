"""Errors of the gradient engine."""

from __future__ import annotations


class NoRuleError(ValueError):
    """A parameter is used in a way for which there is no layer rule."""


class BatchStatisticsError(ValueError):
    """The model normalises by statistics of the batch, so that a sample's gradient depends on the other samples."""


class CoupledSamplesError(ValueError):
    """The output for a sample depends on other samples of the batch, so that it has no gradient of its own."""


class MovedSamplesError(CoupledSamplesError):
    """Samples are not where the plan expects them; whether they influence each other is not known."""


class OutdatedPlanError(RuntimeError):
    """A forward pass differs from the plan."""


class InnerBackwardError(OutdatedPlanError):
    """A forward pass computes gradients itself, so that a detached parameter would be missed in it."""
