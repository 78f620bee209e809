"""Sketched gradients of samples and of classes, for any model.

Cost: one forward pass and a backward pass without weight gradients. The model runs in evaluation mode (dropout off,
BatchNorm by its running statistics), under the autocast that is active at the call, and stays unchanged. The gradients
are those of the loss: hooks on a parameter's gradient (``Tensor.register_hook``) are not called.

Memory beyond the model's and the data's own: for each chunk of B samples, what autograd keeps of the forward pass
without the inputs of linear layers and convolutions, plus ``4 B sum_l T_l c_l`` bytes of sketched activations (T_l
positions of layer l, 1 for a linear layer on vectors; c_l columns of its sketch, the rank in layers larger than it),
plus what one layer needs at a time: the gradients of its input and output, and ``4 B T_l (r_l + c_l) + 4 B r_l c_l``;
and ``4 P D + 4 P L`` for the sums over P classes, ``4 sum_l (r_l p_l + c_l q_l)`` for the matrices, which are kept for
the next call as long as the model lives. With ``norms=False`` a forward and a backward pass for each class may take the
place of it, with the memory of a training step on the class's samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradmix.gradients.by_class import ClassGradients
from gradmix.gradients.by_sample import SampleGradients
from gradmix.gradients.engine import Engine
from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Loss, Scaler
from gradmix.gradients.settings import CHUNK, EngineSettings
from gradmix.gradients.sketches import Sketch
from gradmix.model.inputs import InputTree, num_samples
from gradmix.replay.sources import SampleSource, as_pair


def sample_gradients(
    model: nn.Module,
    batch: tuple[InputTree, Any],
    *,
    layers: str | Sequence[str] = "all",
    rank: int | Mapping[str, int] = 32,
    seed: int = 0,
    sketch: str | Sketch = "rademacher",
    loss: Loss | None = None,
    without_rule: WithoutRule = "error",
    scaler: Scaler = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
) -> SampleGradients:
    """Return sketched gradients of single samples, without forming the gradient of a weight.

    Sample n's gradient G_n of each layer's parameters, as a (p x q) matrix, becomes L G_n R^T (see
    :class:`gradmix.gradients.Sketch`). The loss is not averaged: a sample's gradient does not depend on the others.

    >>> import torch, gradmix
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> batch = torch.randn(8, 64), torch.arange(8)
    >>> gradmix.sample_gradients(model, batch, rank=16).cosine().shape
    torch.Size([8, 8])

    Args:
        model, layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend: as :func:`class_gradients`.
        batch: x and y as the data of :func:`class_gradients`; with ``loss``, y is any argument of it.

    Returns:
        :class:`gradmix.SampleGradients` of N samples.

    Raises:
        ValueError, TypeError: as :func:`class_gradients`.
    """
    x, y = as_pair("batch", batch, any_targets=loss is not None)
    if num_samples(x) == 0:
        raise ValueError("batch: got no samples, expected at least one")
    settings = EngineSettings(layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend)
    engine = Engine(model, settings)
    with engine.evaluation_mode():
        parts = [vectors for _, vectors in engine.samples("batch", (x, y))]
    vectors = parts[0] if len(parts) == 1 else torch.cat(parts)
    return SampleGradients(vectors, engine.layout, engine.sketch.describe())


def class_gradients(
    model: nn.Module,
    data: SampleSource,
    *,
    layers: str | Sequence[str] = "all",
    rank: int | Mapping[str, int] = 32,
    seed: int = 0,
    sketch: str | Sketch = "rademacher",
    loss: Loss | None = None,
    without_rule: WithoutRule = "error",
    scaler: Scaler = None,
    chunk_size: int = CHUNK,
    backend: str = "auto",
    norms: bool = True,
) -> ClassGradients:
    """Return sketched gradients summed by class; the memory does not depend on the number of samples.

    >>> import torch, gradmix
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> first = gradmix.class_gradients(model, (torch.randn(8, 64), torch.arange(8) % 2))
    >>> second = gradmix.class_gradients(model, (torch.randn(8, 64), torch.arange(8) % 3))
    >>> both = first + second
    >>> both.classes, both.counts
    (tensor([0, 1, 2]), tensor([7, 7, 2]))

    The samples must not influence each other, and inside the model their order must not depend on their values (sorted
    by length, routed to experts). Every pass checks that on a few samples, and the first one of each shape on all
    (:mod:`gradmix.gradients.sample_check` describes how, and what is not found). A pass for each class does not depend
    on the order, and does not check it. Costs and memory: :mod:`gradmix.gradients.api`.

    Args:
        model: returns logits (N, C), or an object that holds them as ``.logits``. With ``loss``, the logits may have
            any shape (N, ...). It is called with x alone: a mapping is passed by keyword, a tuple or list by position,
            if the model takes them so.
        data: a ReplayBuffer, an ``(x, y)`` pair, a Dataset or a DataLoader; x a tensor (N, ...) of any dtype, or a
            mapping, tuple or list of such tensors; y (N,) int64 class indices, or (N, C) label vectors, whose largest
            entry is then the sample's class.
        layers: ``"all"`` parameters that require gradients, or patterns (as in the shell) of the names of modules or
            parameters: ``["layer4", "fc"]``.
        rank: k; a layer's sketch has about k * k entries. The error of the cosines of a whole network's gradients is
            about 1/k, that of a single layer's 1/k to 1/sqrt(k) (see :mod:`gradmix.gradients.sketches`). Or a mapping
            from patterns of layers' names to ranks.
        seed: of the sketch. Only sketches of the same seed, ranks and kind can be compared.
        sketch: ``"rademacher"``, ``"gaussian"``, ``"rows"``, ``"identity"`` (no sketch: exact), or a
            :class:`gradmix.gradients.Sketch` of your own, which has its own rank and seed.
        loss: from logits (N, ...) and y to the losses of the samples, (N,); None: cross-entropy.
        without_rule: treatment of parameters without a layer rule: ``"error"``, or ``"exact"``: compute their gradients
            sample by sample, in two to three more passes, or as many as there are samples where ``torch.func`` cannot
            run the model (:mod:`gradmix.gradients.exact`).
        scaler: a GradScaler or a factor for the loss, by which the gradients are divided; for float16, in which small
            gradients underflow. None: 1, or 1024 under float16 autocast.
        chunk_size: samples of one pass (a DataLoader keeps its own batch size up to this).
        backend: of the operators ``class_sketch`` and ``sketch_project``.
        norms: whether to compute ``square_norms``. Without them, a forward and a backward pass for each class, over its
            samples, is made where that is faster: for ``sketch="identity"`` on a CPU if at most four classes occur in a
            chunk; and instead of a pass for each sample, if a class has at least four samples on average.
            ``ClassGradients.ways`` says what was done.

    Returns:
        :class:`gradmix.ClassGradients` of the classes that occur.

    Raises:
        ValueError: no samples, labels out of range, y that are no classes, a NaN (the error names the sample), a layer
            without a rule (``NoRuleError``), samples that influence each other (``CoupledSamplesError``), statistics of
            the batch (``BatchStatisticsError``).
        TypeError: an argument of the wrong type.
    """
    settings = EngineSettings(layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend, norms)
    engine = Engine(model, settings)
    with engine.evaluation_mode():
        total = engine.classes("data", data)
    if total is None:
        raise ValueError("data: got no samples, expected at least one")
    return total
