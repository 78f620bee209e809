"""Base of the estimators of the last layer's gradient: passes that capture the head, and its reference gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gradmix.estimators.base import Estimator, Network, PassSizes
from gradmix.labelled_samples import HeadSamples, check_one_mask
from gradmix.mixtures import Mixtures, Request, labels_dtype
from gradmix.model.forward import forward_all, with_output
from gradmix.model.head import resolve_head
from gradmix.model.head_capture import check_outputs
from gradmix.model.inputs import InputTree, first_tensor
from gradmix.model.refusals import refuse_by_name
from gradmix.ops.mixed_alignment import check_reference, length
from gradmix.references import Keep, Reference, gradient_of_marked, read_buffer


class LastLayerEstimator(Estimator[HeadSamples]):
    """Base of the estimators whose gradients are those of the last layer's weight and bias."""

    full_network: ClassVar[bool] = False

    def __init__(self, network: Network) -> None:
        self.network = network

    def sizes(self, x: InputTree) -> PassSizes:
        """The sizes of a pass, with C from the user or from the head."""
        network = self.network
        if network.num_classes is not None:
            return PassSizes(network.chunk_size, network.num_classes)
        with refuse_by_name("batch", network.model, x):
            return PassSizes(network.chunk_size, resolve_head(network.model, network.head, x).num_classes)

    def prepare(self, request: Request, lam: float) -> Mixtures[HeadSamples]:
        """The batch and the candidates with the head's input and output."""
        network = self.network
        if request.outputs is None:
            batch = self._forward("batch", request)
        else:
            output = check_outputs(network.model, network.head, request.outputs, len(request.batch))
            batch = with_output("batch", request.batch, output)
        candidates = None
        if request.candidates is not None:
            candidates = self._forward("candidates", request)
            check_one_mask(batch, candidates)
        num_classes = batch.logits.shape[1]
        network.check_num_classes(num_classes)
        weights = labels_dtype(request.batch.x)
        return Mixtures(batch, candidates, lam, num_classes, network.chunk_size, weights)

    def _forward(self, name: str, request: Request) -> HeadSamples:
        network = self.network
        return forward_all(network.model, network.head, name, getattr(request, name), network.chunk_size)

    def reference(self, buffer: object, x: InputTree, keep: int = 0) -> tuple[Reference | None, list[HeadSamples]]:
        """The buffer's mean last-layer gradient."""
        network = self.network
        kept = Keep(keep, self.name if self.mixes_inputs else None) if keep else None
        gradient, samples = read_buffer(
            network.model, network.head, buffer, network.chunk_size, first_tensor(x).device, network.group, kept
        )
        return None if gradient is None else Reference(gradient), samples

    def reference_of_marked(self, mixtures: Mixtures[HeadSamples], marked: Tensor) -> Reference:
        """The mean last-layer gradient of the marked samples; ``empty`` says on the device whether there are none."""
        return gradient_of_marked(mixtures.batch, marked, self.network.batch_group)

    def as_reference(self, gradient: object) -> Reference:
        """A tensor as :func:`gradmix.reference_gradient` returns it."""
        if not isinstance(gradient, Tensor):
            raise TypeError(
                f"reference: got {type(gradient).__name__}, expected a tensor as gradmix.reference_gradient gives it"
            )
        return Reference(gradient)

    def reference_norm(self, gradient: Tensor) -> Tensor:
        """The Euclidean norm, ()."""
        return length(gradient)

    def check_fits(self, mixtures: Mixtures[HeadSamples], gradient: Tensor) -> None:
        """Raise ValueError unless the reference is of this last layer."""
        check_reference(gradient, mixtures.num_classes, mixtures.batch.features.shape[1])
