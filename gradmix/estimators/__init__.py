"""Estimators: how the gradient of a mixture is compared with the reference gradient, a file each.

For the last layer's weight and bias:

- ``feature``: the samples' features, logits and labels are mixed; no forward pass but the samples' own.
- ``mixed``: the mixed inputs are forwarded; exact, one forward pass a pair.

and over all parameters, where the reference is the buffer's gradient of the full network:

- ``jvp``: the mixed inputs are forwarded, and the derivative of their loss along the reference is taken; exact.
- ``sketch``: mixtures of the samples' sketched gradients; what is in doubt is scored again by ``jvp``.
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
"""What the user gives: a name, or the settings of an estimator of the full network."""


def resolve(estimator: EstimatorLike, network: Network) -> Estimator[Any]:
    """The estimator that a user names, bound to a network.

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
