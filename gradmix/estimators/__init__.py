"""Estimators: ways to compare the gradient of a mixture with the reference gradient, one file each.

For the last layer's weight and bias:

- ``feature``: the samples' features, logits and labels are mixed; only the samples themselves are forwarded.
- ``mixed``: the mixed inputs are forwarded; exact, one forward pass for each pair.

and over all parameters, where the reference is the buffer's gradient of the full network:

- ``jvp``: the mixed inputs are forwarded, and the derivative of their loss along the reference is taken; exact.
- ``sketch``: mixtures of the samples' sketched gradients; scores in doubt are computed again by ``jvp``.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from gradmix.estimators.base import Estimator, Network, Screening
from gradmix.estimators.feature import Feature
from gradmix.estimators.jvp import Jvp, JvpEstimator
from gradmix.estimators.mixed import Mixed
from gradmix.estimators.sketch import Sketch, SketchEstimator
from gradmix.estimators.table import TableLookup
from gradmix.runtime.validation import check_choice

__all__ = [
    "Estimator",
    "EstimatorLike",
    "EstimatorName",
    "JvpEstimator",
    "Network",
    "Screening",
    "SketchEstimator",
    "TableLookup",
    "resolve",
]

EstimatorName = Literal["feature", "mixed", "jvp", "sketch"]

EstimatorLike: TypeAlias = EstimatorName | JvpEstimator | SketchEstimator
"""An estimator as the user gives it: a name, or the settings of an estimator of the full network."""


def resolve(estimator: EstimatorLike, network: Network) -> Estimator[Any]:
    """Return the estimator that the user gives, bound to a network.

    Raises:
        ValueError: neither a name nor the settings of an estimator.
    """
    if isinstance(estimator, JvpEstimator):
        return Jvp(network, estimator)
    if isinstance(estimator, SketchEstimator):
        return Sketch(network, estimator)
    check_choice("estimator", estimator, get_args(EstimatorName))
    if estimator == "jvp":
        return Jvp(network, JvpEstimator())
    if estimator == "sketch":
        return Sketch(network, SketchEstimator())
    return Feature(network) if estimator == "feature" else Mixed(network)
