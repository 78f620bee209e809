"""The alignment of all mixtures of two sets of samples at one mixing weight: :func:`alignment_matrix`."""

from __future__ import annotations

from torch import Tensor, nn

from gradmix._moved import moved
from gradmix.criteria import Alignment, Criterion
from gradmix.estimators import EstimatorLike, Network, resolve
from gradmix.model.inputs import InputTree
from gradmix.model.unchanged import unwrap
from gradmix.ops.mixed_alignment import check_lam
from gradmix.replay.sources import CHUNK, SampleSource
from gradmix.runtime.workers import refuse_worker
from gradmix.selection import check_request
from gradmix.selector import Rule, Selector


def alignment_matrix(
    model: nn.Module,
    buffer: SampleSource,
    batch: tuple[InputTree, Tensor],
    *,
    lam: float,
    candidates: tuple[InputTree, Tensor] | None = None,
    criterion: Criterion = "sample",
    estimator: EstimatorLike = "feature",
    head: nn.Module | str | None = None,
    backend: str = "auto",
    chunk_size: int = CHUNK,
) -> Alignment:
    """Return the alignment of every mixture of a sample of ``batch`` with a candidate, at one mixing weight.

    Args:
        model, buffer, head, chunk_size: as :func:`reference_gradient`; the buffer must not be empty.
        batch: x (N, ...), a tensor or a tree of tensors, and y, (N,) integers or (N, C) label vectors.
        lam: weight of the batch's sample, in [0, 1].
        candidates: x and y of the M samples that partners come from; None: the batch itself.
        criterion: ``"sample"``, (N, M); or ``"class"``, (P, P) over the classes of both.
        estimator: ``"feature"``, ``"mixed"`` or ``"jvp"`` (which forward all N x M mixtures), or ``"sketch"`` (without
            a recheck here); or a :class:`gradmix.JvpEstimator` or :class:`gradmix.SketchEstimator`.
        backend: of the operator ``mixed_alignment``.

    Returns:
        :class:`Alignment`.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type, named.
    """
    resolved = resolve(estimator, Network(unwrap(model), head, None, chunk_size, backend))
    selector = Selector(resolved, Rule(criterion, 0.0, "uniform"))
    check_lam(lam)
    refuse_worker("alignment_matrix")
    with resolved.guard():
        request = check_request(resolved, batch, candidates, None, ("batch", None))
        reference, _ = resolved.reference(buffer, request.batch.x)
        if reference is None:
            raise ValueError("buffer: got no samples, expected at least one")
        mixtures = resolved.prepare(request, float(lam))
        return selector.align(mixtures, reference).compact()


__getattr__ = moved(
    __name__,
    "gradmix.class_table",
    {
        "ClassTable": "ClassTable",
        "TABLE_LAMS": "TABLE_LAMS",
        "TABLE_ROWS": "TABLE_SAMPLES",
        "Estimator": "gradmix.estimators:EstimatorName",
        "reference_gradient": "gradmix.references:reference_gradient",
    },
)
