"""Per-sample and per-class gradients of any model, sketched: see :func:`gradmix.class_gradients`.

The steps of a call, one file for each:

1. ``api``, ``directions``: the public functions. ``settings`` and ``engine``: checked arguments, chunks of samples.
2. ``layers``: the parameters, and the layers that they form. ``trace``: the calls that use them, and the axis of the
   samples in each (``batch_axis``). ``plan`` and ``planner``: the plan of all passes that follows.
3. ``backward``: a forward and a backward pass. ``intercept`` watches the calls of torch's functions, ``rules`` defines
   the parts of their parameters' gradients, ``accumulators`` computes sketches, norms and inner products from the
   parts. ``sample_check`` verifies that samples do not influence each other. ``exact``: parameters without a rule.
   ``class_passes``: a pass for each class, for sums without norms.
4. ``sketches``: kinds of sketch. ``projection``: products with their matrices. ``layout``: the layers' places.
5. ``by_sample``, ``by_class``: the results. ``similarity`` and ``standard_errors``: figures computed from them.

A new layer rule: see :mod:`gradmix.gradients.rules`.
"""

from gradmix._moved import moved
from gradmix.gradients.api import class_gradients, sample_gradients
from gradmix.gradients.by_class import ClassGradientAverage, ClassGradients
from gradmix.gradients.by_sample import SampleGradients
from gradmix.gradients.directions import Derivatives, directional_derivatives, mean_gradient
from gradmix.gradients.exceptions import BatchStatisticsError, CoupledSamplesError, NoRuleError
from gradmix.gradients.layout import LayerSketch
from gradmix.gradients.similarity import Aligned
from gradmix.gradients.sketches import Gaussian, Identity, Rademacher, RowSampling, Sketch
from gradmix.gradients.standard_errors import standard_errors

__all__ = [
    "Aligned",
    "BatchStatisticsError",
    "ClassGradientAverage",
    "ClassGradients",
    "CoupledSamplesError",
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

__getattr__ = moved(__name__, "gradmix.gradients.exceptions", {"CoupledRowsError": "CoupledSamplesError"})
