"""The reference gradient of the last layer: the mean gradient of the replay buffer, or of marked samples of the batch.

G = mean_n (softmax(z_n) - y_n) [h_n; 1]^T, (C, d + 1), with h_n the head's input and z_n the model's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmix.labelled_samples import HeadSamples, concatenate_samples
from gradmix.model.forward import forward_source
from gradmix.model.head import HeadLike
from gradmix.model.inputs import InputTree, check_alike, check_mixable, first_tensor, tensors_of
from gradmix.model.unchanged import device_of, leave_unchanged, unwrap
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import class_of
from gradmix.ops.last_layer_gradient import last_layer_gradient, last_layer_gradient_op
from gradmix.replay.sources import CHUNK, SampleSource, chunks_of
from gradmix.runtime.collectives import Group, all_gather_samples, all_reduce_sum, check_group
from gradmix.runtime.deferred_checks import can_sync
from gradmix.runtime.workers import refuse_worker


class Reference(NamedTuple):
    """A reference gradient of an estimator.

    Attributes:
        gradient: (C, d + 1) or (C, d) for the last layer; tensors by parameter name for the full network.
        empty: None, or () bool on the device: whether it is the mean of no samples, so that every mixture counts as
            helpful.
    """

    gradient: Any
    empty: Tensor | None = None


def reference_gradient(
    model: nn.Module,
    buffer: SampleSource,
    *,
    head: nn.Module | str | None = None,
    chunk_size: int = CHUNK,
    group: Group = None,
) -> Tensor:
    """Return the mean last-layer gradient of the buffer's cross-entropy, G = mean_n (softmax(z_n) - y_n) [h_n; 1]^T.

    The model runs in evaluation mode and is left as it was.

    Args:
        model: returns logits (N, C), or an object that holds them as ``.logits``.
        buffer: a ReplayBuffer, an ``(x, y)`` pair of tensors or arrays, a Dataset, a DataLoader, any object of samples
            ``(x, y)`` with ``__len__`` and ``__getitem__``, or a function that returns one of these and is called at
            every read (:mod:`gradmix.replay.sources`). x is a tensor, or a mapping, tuple or list of tensors, which is
            passed by keyword or position if the model's ``forward`` takes it so (:mod:`gradmix.model.inputs`).
        head: the classifier, or its name; None: it is searched for.
        chunk_size: samples of one forward pass.
        group: a process group of ``torch.distributed`` whose processes hold the same model and the same buffer: each
            forwards its share of the samples, and all get the same result, to the bit. Every process must call this;
            one that fails leaves the others waiting (:mod:`gradmix.runtime.collectives`). A DataLoader must give the
            same batches in all of them. None: this process forwards all samples.

    Returns:
        (C, d + 1) float32 (float64 for a float64 model), the last column the bias's; (C, d) for a head without bias.

    Raises:
        ValueError: an empty buffer, labels out of range, a NaN (its sample is named), or no certain head.
        TypeError: a buffer of another type.

    >>> import torch, gradmix
    >>> model = torch.nn.Linear(2, 2)
    >>> G = gradmix.reference_gradient(model, (torch.eye(2), torch.tensor([0, 1])))
    >>> G.shape
    torch.Size([2, 3])
    """
    refuse_worker("reference_gradient")
    check_group(group)
    model = unwrap(model)
    with leave_unchanged(model):
        reference, _ = read_buffer(model, head, buffer, chunk_size, device_of(model), group)
    if reference is None:
        raise ValueError("buffer: got no samples, expected at least one")
    return reference


def read_buffer(
    model: nn.Module,
    head: HeadLike,
    buffer: object,
    chunk_size: int,
    device: torch.device,
    group: Group,
    keep: Keep | None = None,
) -> tuple[Tensor | None, list[HeadSamples]]:
    """Return the reference gradient, None for an empty buffer; and the first samples of each class, in chunks.

    Both are the same in all processes of a group. Each process forwards its share.

    Args:
        model, head, chunk_size: as :func:`gradmix.model.forward.forward_source`.
        buffer: the source of samples.
        device: device of the forward passes.
        group: the processes.
        keep: which samples are kept; None: none.
    """
    total = MeanGradient()
    kept: list[HeadSamples] = []
    places: list[Tensor] = []
    quota = ClassQuota(0 if keep is None else keep.per_class)
    for start, samples in forward_source(model, head, "buffer", buffer, chunk_size, device, group):
        total.add(samples)
        if keep is not None:
            index = quota.admit(samples.y)
            kept.append(keep.reduce(samples).take(index))
            places.append(start + index)
    if keep is not None and kept and group is not None:
        # The first samples of the whole buffer are among the first samples of each share.
        everyone = concatenate_samples(kept, kept[0].logits.shape[1]).gather(group)
        everyone = everyone.take(all_gather_samples(torch.cat(places), group).argsort())
        kept = [everyone.take(ClassQuota(keep.per_class).admit(everyone.y))]
    return total.value(group), kept


@contextmanager
def name_shapes_of_buffer(buffer: object, x: InputTree) -> Iterator[None]:
    """Name the shapes of the buffer's samples and the batch's where a pass fails and they differ.

    They may differ otherwise, as a model may take several.

    Args:
        buffer: the source of samples; None: none is read.
        x: the inputs of the batch, checked.

    Raises:
        ValueError, TypeError: the body raises a RuntimeError, and the buffer's samples are unlike the batch's.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if buffer is not None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            for own, _ in islice(chunks_of("buffer", buffer, 1, first_tensor(x).device), 1):
                try:
                    check_alike("buffer", own, x, f"the batch ({reason})")
                except (ValueError, TypeError) as refusal:
                    raise refusal from error
        raise


@dataclass(frozen=True)
class Keep:
    """The samples of the buffer to keep while it is read.

    Attributes:
        per_class: number of samples of each class, the first ones.
        inputs_for: name of the estimator that mixes their inputs; None: inputs are not kept.
    """

    per_class: int
    inputs_for: str | None

    def reduce(self, samples: HeadSamples) -> HeadSamples:
        """Return the samples, without their inputs unless these are kept.

        Raises:
            TypeError: the inputs are kept and cannot be mixed.
        """
        if self.inputs_for is None:
            return samples.without_inputs()
        check_mixable("buffer", samples.x, self.inputs_for)
        return samples


class MeanGradient:
    """Running sum of last-layer gradients; its mean is the reference gradient."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, samples: HeadSamples) -> None:
        """Add sum_n r_n [h_n; 1]^T of these samples."""
        self._sum = last_layer_gradient(
            samples.features, samples.logits, samples.y, bias=samples.appends_one, out=self._sum
        )
        self._count += len(samples)

    def value(self, group: Group = None) -> Tensor | None:
        """Return the mean over all processes of a group, (C, d + 1), or (C, d) without bias; None without samples.

        Either all processes have called :meth:`add`, possibly with no samples, or none has.
        """
        if self._sum is None or group is None:
            return None if self._sum is None else self._sum / self._count
        total, count = all_reduce_sum([self._sum, torch.full_like(self._sum[0, 0], self._count)], group)
        return total / count


def gradient_of_marked(samples: HeadSamples, marked: Tensor, group: Group = None) -> Reference:
    """The mean last-layer gradient of the samples that are marked; the host waits for nothing.

    Args:
        samples: N.
        marked: (N,) bool.
        group: processes, each with samples of its own, over all of which the mean is taken.

    Returns:
        (C, d + 1), or (C, d) without bias; zero where no sample is marked, which ``empty`` says unless it is None.
    """
    h, z, y = samples.features, samples.logits, samples.y
    h = h.to(work_dtype(h.dtype))
    width = h.shape[1] + samples.appends_one
    count: int | None = None
    if can_sync(marked.device):
        index = marked.nonzero()[:, 0]
        count = len(index)
        h, z, y = (value.index_select(0, index) for value in (h, z, y))
    else:
        # A zero [h; 1] adds nothing: the other samples are not removed, as the host would have to know their number.
        h = torch.cat([h, h.new_ones(len(h), 1)], 1) if samples.appends_one else h
        h = h.masked_fill(~marked[:, None], 0)
    total = h.new_zeros(z.shape[1], width)
    last_layer_gradient_op(total, h, z, y, "tf32x3", "auto")
    if count and group is None:
        return Reference(total.div_(count))
    total, number = all_reduce_sum([total, marked.sum().to(total.dtype)], group)
    return Reference(total / number.clamp(min=1), number == 0)


def dtype_of(gradient: Any) -> torch.dtype:
    """Return the dtype to which all tensors of a reference gradient promote."""
    return reduce(torch.promote_types, (part.dtype for part in tensors_of(gradient)))


def none_if_empty(reference: Reference | None) -> Reference | None:
    """Return the reference, or None if it is the mean of no samples; the host waits for the device."""
    if reference is None or reference.empty is None:
        return reference
    return None if bool(reference.empty) else Reference(reference.gradient)


class ClassQuota:
    """Admits the first ``limit`` samples of every class over several calls."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count: dict[int, int] = {}

    def admit(self, labels: Tensor) -> Tensor:
        """Return the indices (K,) int64 of this call's samples that are within the quota, ascending."""
        labels = class_of(labels)
        order = torch.argsort(labels, stable=True)
        classes, counts = torch.unique_consecutive(labels[order], return_counts=True)
        found = classes.tolist()
        before = [self._count.get(label, 0) for label in found]
        for label, known, more in zip(found, before, counts.tolist(), strict=True):
            self._count[label] = known + more
        # The place of each sample among all of its class.
        first = torch.tensor(before, dtype=torch.int64, device=labels.device) + counts - counts.cumsum(0)
        place = torch.arange(len(labels), device=labels.device) + first.repeat_interleave(counts)
        return order[place < self._limit].sort().values
