"""Forward passes of labelled samples in chunks, with the head's input and output captured and checked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gradmix.labelled_samples import HeadSamples, LabelledSamples, concatenate_samples
from gradmix.model.head import CapturedOutput, HeadLike
from gradmix.model.head_capture import forward_head
from gradmix.model.head_values import MASKED
from gradmix.model.inputs import first_tensor
from gradmix.model.refusals import refuse_by_name
from gradmix.model.unchanged import require_finite
from gradmix.ops.labels import are_live, check_label_range, within_range
from gradmix.replay.sources import chunks_of, chunks_with_numbers, split
from gradmix.runtime.collectives import Group
from gradmix.runtime.deferred_checks import check_where, compute_checks


def forward_all(model: nn.Module, head: HeadLike, name: str, samples: LabelledSamples, chunk_size: int) -> HeadSamples:
    """Forward all ``samples`` and return them with the head's input and output.

    Call it inside :func:`gradmix.model.unchanged.leave_unchanged`.

    Args:
        model: the unwrapped model.
        head: the head, its name, or None: it is searched for.
        name: name of the samples in errors.
        samples: one or more, checked, on one device.
        chunk_size: samples of one pass.

    Raises:
        ValueError: a NaN or an infinity in a sample or in the model's output for it (the error names the sample), or a
            label out of range.
    """
    if len(samples) <= chunk_size:
        return _forward_chunk(model, head, name, samples.x, samples.y, 0)
    chunks = split(samples.x, samples.y, chunk_size, first_tensor(samples.x).device, 0)
    parts = [_forward_chunk(model, head, name, x, y, start) for start, x, y in chunks]
    return concatenate_samples(parts, parts[0].logits.shape[1])


def forward_source(
    model: nn.Module,
    head: HeadLike,
    name: str,
    source: object,
    chunk_size: int,
    device: torch.device,
    group: Group = None,
) -> Iterator[tuple[int, HeadSamples]]:
    """Yield this process's share of ``source`` in chunks: the number of each chunk's first sample, and the chunk.

    If the share of a process is empty and the source is not, it gets one empty chunk, which has their shapes. Call
    it inside :func:`gradmix.model.unchanged.leave_unchanged`.
    """
    empty = True
    for start, x, y in chunks_with_numbers(name, source, chunk_size, device, group):
        yield start, _forward_chunk(model, head, name, x, y, start)
        compute_checks()  # before the source writes the next chunk to the same memory
        empty = False
    if empty and group is not None:
        for x, y in islice(chunks_of(name, source, 1, device), 1):
            yield 0, _forward_chunk(model, head, name, x, y, 0).take(torch.arange(0, device=y.device))


def _forward_chunk(model: nn.Module, head: HeadLike, name: str, x: Any, y: Tensor, first: int) -> HeadSamples:
    with refuse_by_name(name, model, x):
        output = forward_head(model, head, x)
    return with_output(name, LabelledSamples(x, y), output, first)


def with_output(name: str, samples: LabelledSamples, output: CapturedOutput, first: int = 0) -> HeadSamples:
    """Check the head's input and output, and return the samples with them.

    Args:
        name: name of the samples in errors.
        samples: N samples.
        output: the head's input and output for them.
        first: number of the first sample, for errors.

    Raises:
        ValueError: a NaN or an infinity, a label beyond the logits' classes or of a class that the model masks.
    """
    (x, y), (features, logits) = (samples.x, samples.y), output
    if len(features) != len(y):
        raise ValueError(f"{name}: the head ran on {len(features)} samples, expected {len(y)} as there are labels")
    require_finite(
        first, **{name: x, f"the model's features of {name}": features, f"the model's logits of {name}": logits}
    )
    if not are_live(y, logits, MASKED):
        y = _live_labels(name, y, logits, first)
    return HeadSamples(x, y, features, logits, output.appends_one)


def _live_labels(name: str, y: Tensor, logits: Tensor, first: int) -> Tensor:
    """Return the labels, held in the classes' range, after the check that they are of classes that are not masked."""
    check_label_range(name, y, logits.shape[1], first)
    y = within_range(y, logits.shape[1])
    check_where(
        _has_masked_label,
        (logits, y),
        lambda sample: ValueError(
            f"{name}: sample {first + sample} has a label among the classes that the model masks, expected labels of "
            "the others: the loss of a masked class has no gradient that could be compared"
        ),
    )
    return y


def _has_masked_label(logits: Tensor, y: Tensor) -> Tensor:
    """Return (N,) bool: whether a sample's label is, or its label vector has, a class that the model masks."""
    if y.is_floating_point():
        return ((logits <= MASKED) & (y > 0)).any(1)
    return logits.gather(1, y[:, None])[:, 0] <= MASKED
