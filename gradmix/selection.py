"""Select for each sample a partner with which it may be mixed: :func:`select_pairs`, for one batch.

A mixture is allowed if its gradient does not point against the gradient of the replay buffer; each sample is then given
one allowed partner, or stays as it is. :class:`gradmix.GradMix` keeps between steps what this computes in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradmix._moved import moved
from gradmix.criteria import Alignment, Criterion
from gradmix.draw import Policy, Proposal
from gradmix.estimators import EstimatorLike, Network, resolve
from gradmix.estimators.base import Estimator
from gradmix.estimators.full_network import FullGradient
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixing_weight import check_alpha, draw_lam
from gradmix.mixtures import Mixtures, Request
from gradmix.model.head import HeadOutput
from gradmix.model.inputs import InputTree, check_alike, check_mixable, first_tensor, map_tensors
from gradmix.model.unchanged import disable_autograd, unwrap
from gradmix.ops.mixed_alignment import check_lam
from gradmix.pairs import Pairs
from gradmix.references import Reference, name_shapes_of_buffer
from gradmix.replay.sources import CHUNK, SampleSource, as_pair
from gradmix.runtime.collectives import Group
from gradmix.runtime.cuda_graphs import Graphs
from gradmix.runtime.deferred_checks import call_with_checks
from gradmix.runtime.random import default_generator
from gradmix.runtime.transfer import to_device_async
from gradmix.runtime.workers import refuse_worker
from gradmix.selector import MarkedSelector, Rule, Selector


def select_pairs(
    model: nn.Module,
    buffer: SampleSource | Tensor,
    batch: tuple[InputTree, Tensor],
    *,
    candidates: tuple[InputTree, Tensor] | None = None,
    criterion: Criterion = "sample",
    estimator: EstimatorLike = "feature",
    alpha: float = 1.0,
    lam: float | None = None,
    threshold: float = 0.0,
    policy: Policy = "uniform",
    head: nn.Module | str | None = None,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    reference: Tensor | FullGradient | None = None,
    outputs: HeadOutput | tuple[Tensor, Tensor] | None = None,
    chunk_size: int = CHUNK,
    group: Group = None,
) -> Pairs:
    """Select for each sample of a batch a partner with which it may be mixed without harm to the replay buffer.

    >>> import torch, gradmix
    >>> model, buffer = torch.nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    >>> pairs = gradmix.select_pairs(model, buffer, (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])))
    >>> x, y = pairs.mix()  # train on these
    >>> x.shape, y.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))

    A mixture lam a + (1 - lam) b is helpful if the cosine of its gradient with the reference gradient, the mean
    gradient of the buffer, is at least ``threshold``; by default gradients are those of the last layer. Each sample
    gets one helpful partner. A sample without one stays unmixed: its lam is 1. With an empty buffer every mixture
    counts as helpful, which is plain Mixup. All mixtures of a call have the same lam.

    The model, the given tensors, autograd's state and the global random generators stay unchanged, also if the model
    raises. :class:`gradmix.GradMix` does the same in a training loop, and keeps results between steps.

    Args:
        model: the classifier in training; returns logits (N, C), or an object that holds them as ``.logits``.
        buffer: the replay buffer: a :class:`gradmix.ReplayBuffer`, an ``(x, y)`` pair of tensors or arrays, a Dataset,
            a DataLoader, any object of samples ``(x, y)`` with ``__len__`` and ``__getitem__`` (such as a list), or a
            function that returns one of these and is called at every read (:mod:`gradmix.replay.sources`). Or (N,)
            bool, which marks the replayed samples of the batch: the reference is then their mean gradient, from the
            forward pass of the batch, and no buffer is read. A mask without a True counts as an empty buffer.
        batch: the samples to mix, replayed ones among them: x (N, ...) and y, (N,) integer class indices or (N, C)
            label vectors. x is a tensor, or a mapping, tuple or list of tensors with one N, which is passed by keyword
            or position if the model's ``forward`` takes it so, else as one argument. Estimators that mix inputs mix the
            tensors of a floating-point dtype; the others, such as token ids, must be equal for a sample and its
            partner. The estimator ``feature`` takes any x that the model takes.
        candidates: the M samples that partners come from, (x, y); None: the batch itself, where no sample is its own
            partner.
        criterion: ``"sample"``: the inner product of each pair decides. ``"class"``, as in the paper: the mean over the
            pairs of the same two classes decides.
        estimator: how a mixture's gradient is computed.

            - ``"feature"``: of the last layer, samples mixed at its input; no mixture is forwarded.
            - ``"mixed"``: of the last layer, exact; all N x M mixtures are forwarded, or with ``permute`` N of them.
            - ``"jvp"`` or :class:`gradmix.JvpEstimator`: of all parameters, exact; forwards as ``mixed``.
            - ``"sketch"`` or :class:`gradmix.SketchEstimator`: of all parameters, from sketches of the samples'
              gradients; decisions in doubt are rechecked by forwarded mixtures, up to a budget.
        alpha: lam is drawn from Beta(alpha, alpha).
        lam: weight of the sample itself, in [0, 1], in place of a random one.
        threshold: smallest cosine of a helpful mixture; 0 is an angle of 90 degrees.
        policy: ``"uniform"``: a random helpful partner. ``"permute"``: one random partner, as in Mixup, kept if it is
            helpful. ``"best"``: the partner with the largest cosine, ties broken at random; the model then forgets less
            and learns less, and the reference gradient must be that of the present step (docs/results/partner.md).
        head: the classifier layer, or its name; None: the linear layers that end in the logits are searched for.
        num_classes: length of the mixed label vectors; None: the head's.
        generator: source of all random numbers; the same state gives the same result. None: the library's own
            generator, seeded by ``torch.initial_seed()`` and restarted by every call of ``torch.manual_seed``.
        backend: of the operators (:func:`gradmix.set_backend`).
        reference: a reference gradient computed earlier, in place of a pass over the buffer
            (:func:`gradmix.reference_gradient`; for ``jvp`` and ``sketch`` :func:`gradmix.gradients.mean_gradient`).
        outputs: features (N, d) and logits (N, C) of the batch from an earlier forward pass
            (:class:`gradmix.HeadCapture`), in place of one made here; ``jvp`` and ``sketch`` do not use them.
        chunk_size: samples of one forward pass.
        group: processes that share the reference gradient, each with a batch of its own, as
            :func:`gradmix.reference_gradient`; with a mask, the mean is over the marked samples of all of them.

    Returns:
        :class:`gradmix.Pairs`.

    Raises:
        ValueError: a value out of range, a NaN or an infinity (the error names the sample), labels beyond the model's
            classes, an empty batch, or no certain head. On a GPU errors in values are raised by the next call, as this
            one does not wait (:mod:`gradmix.runtime.deferred_checks`; estimators ``feature`` and ``mixed``).
        TypeError: an argument of the wrong type.
        BatchStatisticsError: the model normalises by statistics of the batch.
        RuntimeError: called in a worker process of a DataLoader.
    """
    network = Network(unwrap(model), head, num_classes, chunk_size, backend, group)
    resolved, rule = resolve(estimator, network), Rule(criterion, threshold, policy)
    check_weight(alpha, lam)
    refuse_worker("select_pairs")
    generator = default_generator() if generator is None else generator
    marked = buffer if reference is None and isinstance(buffer, Tensor) else None
    reads_buffer = reference is None and marked is None
    with resolved.guard(resolved.needs_passes(candidates, outputs, reads_buffer)):
        request = check_request(resolved, batch, candidates, outputs, ("buffer", marked))
        known = None
        with name_shapes_of_buffer(buffer if reads_buffer else None, request.batch.x):
            if reference is not None:
                known = resolved.as_reference(reference)
            elif reads_buffer:
                known, _ = resolved.reference(buffer, request.batch.x)
            lam = draw_lam(alpha, generator) if lam is None else float(lam)
            return select(Selector(resolved, rule), request, known, lam, generator)


def select(
    selector: Selector,
    request: Request,
    known: Reference | None,
    lam: float,
    generator: torch.Generator,
    graphs: Graphs | None = None,
) -> Pairs:
    """Select by a known reference; call it inside :meth:`gradmix.estimators.base.Estimator.guard`.

    Args:
        selector: the scorer and the rule.
        request: checked arguments; with marked samples their gradient is the reference.
        known: the reference gradient or the class table; None: the buffer is empty, or samples are marked.
        lam: weight of the sample itself.
        generator: source of the draws.
        graphs: captures the calls of a pure selector, with the checks so far; None: they are calls.
    """
    scorer, batch, screening = selector.scorer, request.batch, None
    own = request.candidates is None
    device = first_tensor(batch.x).device
    proposal = Proposal(selector.rule.policy, len(batch), len(request.partners), own, generator, device)
    # Without a reference gradient nothing is scored, and only labels are needed.
    only_labels = known is None and request.marked is None
    mixtures = scorer.prepare_labels(request, lam) if only_labels else scorer.prepare(request, lam)
    bare, marked = mixtures.without_inputs(), request.marked
    if marked is not None and not (scorer.is_pure and scorer.network.batch_group is None):
        known, marked = scorer.reference_of_marked(mixtures, marked), None
    if marked is not None:
        decision = call_with_checks(MarkedSelector(selector), (bare, proposal.numbers(), marked), graphs)
        known = Reference(decision.gradient, decision.empty)
    elif known is None:
        decision = selector.choose_any(mixtures, proposal.numbers())
    elif scorer.is_pure:
        decision = call_with_checks(selector, (bare, proposal.numbers(), known), graphs)
    else:
        scores, screening = selector.score(mixtures, known, proposal)
        decision = selector.choose(scores, mixtures, known, proposal.numbers())
    alignment: Alignment | Callable[[], Alignment] | None = decision.alignment
    if alignment is None:
        assert known is not None
        # What no decision needed is computed when it is asked for.
        alignment = partial(_align, selector, bare, known, _versions(bare))
    return Pairs(
        decision.partner,
        decision.lam,
        decision.helpful,
        mixtures.num_classes,
        alignment,
        LabelledSamples(batch.x, mixtures.batch.y),
        None if request.candidates is None else LabelledSamples(request.candidates.x, mixtures.partners.y),
        screening,
    )


def _align(selector: Selector, mixtures: Mixtures[Any], reference: Reference, versions: list[int]) -> Alignment:
    if _versions(mixtures) != versions:
        raise RuntimeError(
            "alignment: the labels, features or logits that pairs were selected by have been written in place since; "
            "read Pairs.alignment before, or leave them as they are"
        )
    with disable_autograd():
        return selector.align(mixtures, reference)


def _versions(mixtures: Mixtures[Any]) -> list[int]:
    """Return how often the samples' tensors were written; those made in inference mode do not count."""
    parts = [mixtures.batch] if mixtures.candidates is None else [mixtures.batch, mixtures.candidates]
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def check_request(
    estimator: Estimator[Any],
    batch: tuple[InputTree, Tensor],
    candidates: tuple[InputTree, Tensor] | None,
    outputs: HeadOutput | tuple[Tensor, Tensor] | None,
    marked: tuple[str, object],
) -> Request:
    """Check the arguments of one selection and move them to the batch's device.

    Args:
        estimator: the estimator, which may require inputs that can be mixed.
        batch, candidates, outputs: as :func:`select_pairs`.
        marked: name of the argument in errors, and (N,) bool, the marked samples of the batch; None: there are none.
    """
    own = LabelledSamples(*as_pair("batch", batch))
    if len(own) == 0:
        raise ValueError("batch: got no samples, expected at least one")
    if estimator.mixes_inputs:
        check_mixable("batch", own.x, estimator.name)
    device = first_tensor(own.x).device
    other = None
    if candidates is not None:
        x, y = as_pair("candidates", candidates)
        if len(y) == 0:
            raise ValueError("candidates: got no samples, expected at least one")
        check_alike("candidates", x, own.x, "the batch")
        other = LabelledSamples(map_tensors(lambda leaf: leaf.to(device), x), y.to(device))
    name, marks = marked
    return Request(own, other, outputs, None if marks is None else _check_marks(name, marks, len(own), device))


def _check_marks(name: str, marked: object, count: int, device: torch.device) -> Tensor:
    """Check the marks of the batch's samples and return them, (N,) bool, on its device."""
    if not isinstance(marked, Tensor):
        raise TypeError(f"{name}: got {type(marked).__name__}, expected a bool tensor that marks samples of the batch")
    if marked.dtype != torch.bool:
        raise TypeError(
            f"{name}: got a tensor of dtype {marked.dtype}, expected bool, which marks samples of the batch"
        )
    if marked.shape != (count,):
        raise ValueError(
            f"{name}: got a mask of shape {tuple(marked.shape)}, expected ({count},) as the batch's samples"
        )
    return to_device_async(marked, device)


def check_weight(alpha: float, lam: float | None) -> None:
    """Raise unless ``alpha`` is a parameter of Beta(alpha, alpha), and ``lam`` None or a weight in [0, 1]."""
    check_alpha(alpha)
    if lam is not None:
        check_lam(lam)


__getattr__ = moved(__name__, "gradmix.mixer", {"GradMix": "GradMix"})
