"""Per-sample and per-class gradients of any layer, sketched: see :func:`gradmix.class_gradients`."""

from gradmix.gradients.accumulators import LayerSketch
from gradmix.gradients.by_class import ClassGradientAverage, ClassGradients
from gradmix.gradients.by_sample import SampleGradients
from gradmix.gradients.directions import Derivatives, directional_derivatives, mean_gradient
from gradmix.gradients.engine import class_gradients, sample_gradients
from gradmix.gradients.intercept import BatchStatisticsError
from gradmix.gradients.plan import CoupledRowsError, NoRuleError
from gradmix.gradients.similarity import Aligned
from gradmix.gradients.sketches import Gaussian, Identity, Rademacher, RowSampling, Sketch
from gradmix.gradients.standard_errors import standard_errors

__all__ = [
    "Aligned",
    "BatchStatisticsError",
    "ClassGradientAverage",
    "ClassGradients",
    "CoupledRowsError",
    "Derivatives",
    "Gaussian",
    "Identity",
    "LayerSketch",
    "NoRuleError",
    "Rademacher",
    "RowSampling",
    "SampleGradients",
    "Sketch",
    "class_gradients",
    "directional_derivatives",
    "mean_gradient",
    "sample_gradients",
    "standard_errors",
]
