"""Layer rules: the parts of the per-sample gradients of a layer's parameters, one file for each family of functions.

A rule belongs to functions of torch that are linear in their parameters, up to a constant: ``F.linear``,
``torch.conv2d``. :mod:`gradmix.gradients.intercept` watches the calls in a model's forward pass, in any module. With
the input activations a_t and the gradients d_t of the output, at positions t, the gradient of one sample as a matrix is
one of two kinds:

- a sum of outer products, sum_t d_t a_t^T (:class:`Outer`): linear layers, convolutions (a_t is the window seen at t),
  embeddings (one factor is one-hot). It is never formed: both factors are projected before they are multiplied.
- small, and formed (:class:`Dense`): normalisation, depthwise convolutions, single biases, class tokens, position
  embeddings.

A parameter's matrix is ``parameter.reshape(rows, -1)``; the bias of a layer is one more column.

How to add a rule
-----------------

1. Choose the file of the family: ``linear``, ``einsum`` (products with a parameter of any number of axes),
   ``convolution``, ``embedding``, ``normalisation``, ``elementwise`` (sums, scales, PReLU, class tokens). A new family
   is a new file, which is imported at the end of this one. ``nn.MultiheadAttention`` needs none: the calls inside it
   are watched one by one. Recurrent layers have none: ``nn.LSTM`` calls a single function, which is not linear in
   its weights.
2. Derive a class from :class:`Rule` and register it for the functions, as in the example below.
3. ``signature``: all of the function's arguments by name, in order, with their defaults. The activations are called
   ``input``, the parameters ``weight`` and ``bias``.
4. ``refusal``: the reason why the rule does not cover a call, or None. It goes into the sentence "'name', which is used
by
   torch.functional.tensordot: reason".
5. ``parts``: the gradient. ``axis.by_position`` returns activations as (N, T, d), to which a projection is applied.
6. Defaults to override if they do not fit: ``matrix_shape`` (the first axis against the others), ``batch_dims``
   (any axis but the last may hold the samples; :class:`ChannelsFirst`: axis 0), ``tangent`` (the function itself,
   called with the directions as parameters).
7. Add cases to ``LAYERS`` in ``tests/gradient_networks.py``. Every case is checked against a loop over single samples,
   in three precisions and along directions.

The example is run by ``tests/gradients/test_gradient_rule_recipe.py``::

    @register(torch.tensordot)
    class TensorDot(Rule):
        '''y = x contracted with W (in, out) over one axis: the gradient is sum_t x_t d_t^T.'''

        signature = {"input": ..., "weight": ..., "dims": 2, "out": None}

        def refusal(self):
            if self.arguments["dims"] != 1 or self.weight.value.ndim != 2 or not self.weight.is_whole:
                return "it is contracted as other than a matrix over one axis"
            return None

        def parts(self, placement, axis, samples):
            x = self.x
            yield Outer(
                placement.layer[self.weight.name],
                "row",  # the factor of the matrix's rows is made of the activations
                lambda projection: projection.apply(axis.by_position(x, samples)),
                lambda d, projection: projection.apply(axis.by_position(d, samples)),
            )
"""

from gradmix.gradients.rules import convolution, einsum, elementwise, embedding, linear, normalisation
from gradmix.gradients.rules.base import (
    RULES,
    ChannelsFirst,
    Dense,
    FunctionCall,
    Outer,
    Part,
    Placement,
    Rule,
    register,
)
from gradmix.gradients.rules.parameter_view import ParameterView, matrix_shape, token_shape

__all__ = [
    "RULES",
    "ChannelsFirst",
    "Dense",
    "FunctionCall",
    "Outer",
    "ParameterView",
    "Part",
    "Placement",
    "Rule",
    "convolution",
    "einsum",
    "elementwise",
    "embedding",
    "linear",
    "matrix_shape",
    "normalisation",
    "register",
    "token_shape",
]
