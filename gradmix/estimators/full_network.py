"""Base of the estimators of the full network's gradient: its engine, and its reference gradient.

The reference is the mean gradient of the buffer with respect to all parameters, by name
(:func:`gradmix.gradients.mean_gradient`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from gradmix.estimators.base import Estimator, Network, PassSizes
from gradmix.gradients.directions import derivatives_of, mean_gradient_of
from gradmix.gradients.engine import Engine
from gradmix.gradients.layers import WithoutRule
from gradmix.gradients.losses import Scaler
from gradmix.gradients.settings import EngineSettings
from gradmix.labelled_samples import LabelledSamples
from gradmix.mixtures import Mixtures, Request
from gradmix.model.inputs import InputTree, check_mixable, first_tensor, floating_dtype, mix_trees, take
from gradmix.model.refusals import name_dtypes
from gradmix.model.unchanged import device_of, require_finite
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import dense_labels
from gradmix.references import ClassQuota, Reference
from gradmix.replay.sources import chunks_of
from gradmix.runtime.collectives import Group

FullGradient: TypeAlias = Mapping[str, Tensor]
"""A gradient with respect to all parameters, by name."""


class FullNetworkSettings(Protocol):
    """The settings that both estimators of the full network have."""

    @property
    def layers(self) -> str | Sequence[str]:
        """The layers whose parameters count."""

    @property
    def without_rule(self) -> WithoutRule:
        """Treatment of a parameter without a rule."""

    @property
    def scaler(self) -> Scaler:
        """The loss scale."""

    @property
    def memory(self) -> int | None:
        """Bytes that a pass may take, or None."""


def check_memory(memory: object) -> None:
    """Raise unless ``memory`` is None or a number of bytes >= 1."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory: got {type(memory).__name__}, expected a number of bytes or None")
    if memory < 1:
        raise ValueError(f"memory: got {memory}, expected a number of bytes >= 1")


class FullNetworkEstimator(Estimator[LabelledSamples]):
    """Base of the estimators whose gradients are those of all parameters."""

    full_network: ClassVar[bool] = True
    scores_itself: ClassVar[bool] = False

    def __init__(self, network: Network, settings: FullNetworkSettings) -> None:
        self.network, self.name = network, type(settings).__name__
        self._settings = settings

    def engine_settings(self, layers: str | Sequence[str], chunk_size: int) -> EngineSettings:
        """Return the gradient engine's settings for exact gradients of ``layers``."""
        settings = self._settings
        return EngineSettings(
            layers=layers, without_rule=settings.without_rule, scaler=settings.scaler, chunk_size=chunk_size
        )

    def engine(self, layers: str | Sequence[str], chunk_size: int) -> Engine:
        """Return a gradient engine for exact gradients of ``layers``."""
        return Engine(self.network.model, self.engine_settings(layers, chunk_size))

    # ------------------------------------------------------------------------------------------------------- samples

    def sizes(self, x: InputTree) -> PassSizes:
        """The sizes of a pass that the memory allows.

        Raises:
            ValueError: a sample holds a NaN or an infinity, or C is not the number that the user gave.
        """
        require_finite(0, batch=x)
        memory, device = self._settings.memory, first_tensor(x).device
        if memory is None:
            memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 4 << 30
        engine = self.engine(self._settings.layers, self.network.chunk_size)
        with name_dtypes("batch", engine.model, lambda: x):
            plan = engine.plan_of(x)
        self.network.check_num_classes(plan.num_classes)
        return PassSizes(engine.samples_within(memory, plan), plan.num_classes)

    def prepare(self, request: Request, lam: float) -> Mixtures[LabelledSamples]:
        """The mixtures with labels alone, as only mixtures are forwarded."""
        return self.prepare_labels(request, lam)

    # ----------------------------------------------------------------------------------------------------- reference

    def reference(self, buffer: object, x: InputTree, keep: int = 0) -> tuple[Reference | None, list[LabelledSamples]]:
        """The buffer's mean gradient."""
        chunk_size = self.sizes(x).chunk_size
        gradient = self.mean_gradient("buffer", buffer, chunk_size, self.network.group, shared=True)
        if gradient is None:
            return None, []
        kept = self._first_of_classes(buffer, keep, first_tensor(x).device) if keep else []
        return Reference(gradient), kept

    def _first_of_classes(self, buffer: object, per_class: int, device: torch.device) -> list[LabelledSamples]:
        """Return up to ``per_class`` samples of each class of the buffer, in chunks."""
        quota, kept = ClassQuota(per_class), []
        for x, y in chunks_of("buffer", buffer, self.network.chunk_size, device):
            check_mixable("buffer", x, self.name)
            kept.append(LabelledSamples(x, y).take(quota.admit(y)))
        return kept

    def reference_of_marked(self, mixtures: Mixtures[LabelledSamples], marked: Tensor) -> Reference | None:
        """The marked samples' mean gradient."""
        own, group = mixtures.batch.take(marked), self.network.batch_group
        gradient = self.mean_gradient("replayed samples", (own.x, own.y), mixtures.chunk_size, group, shared=False)
        return None if gradient is None else Reference(gradient)

    def mean_gradient(
        self, name: str, source: object, chunk_size: int, group: Group, *, shared: bool
    ) -> dict[str, Tensor] | None:
        """Return the mean gradient of a source's samples; None if it is empty.

        Args:
            name: name of the samples in errors.
            source: of samples.
            chunk_size: samples of one pass.
            group, shared: as :func:`gradmix.gradients.directions.mean_gradient_of`.
        """
        engine = self.engine(self._settings.layers, chunk_size)

        def first() -> InputTree:
            return next((x for x, _ in chunks_of(name, source, 1, device_of(engine.model))), ())

        with engine.evaluation_mode(), name_dtypes(name, engine.model, first):
            return mean_gradient_of(engine, name, source, group, shared=shared)

    def as_reference(self, gradient: object) -> Reference:
        """A gradient by parameter name, as :func:`gradmix.gradients.mean_gradient` returns it."""
        if isinstance(gradient, Mapping) and all(isinstance(value, Tensor) for value in gradient.values()):
            return Reference(gradient)
        raise TypeError(
            f"reference: got {type(gradient).__name__}, expected the gradient with respect to all parameters by name, "
            "as gradmix.gradients.mean_gradient gives it, for this estimator"
        )

    def reference_norm(self, gradient: FullGradient) -> Tensor:
        """The norm ||G||, ()."""
        return torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()

    # -------------------------------------------------------------------------------------------------------- scores

    def score_pairs(
        self, mixtures: Mixtures[LabelledSamples], gradient: FullGradient, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return inner products and norms, both (K,), of ``pairs`` (K, 2), each mixed and forwarded; exact.

        The derivative of a mixture's loss along the reference is its inner product with it.
        """
        chunk_size, lam = mixtures.chunk_size, float(mixtures.lam)
        engine = self.engine(list(gradient), chunk_size)
        own, other = mixtures.batch, mixtures.partners
        dtype = work_dtype(floating_dtype(own.x) or torch.float32)
        inner, norm = [own.y.new_zeros(0, dtype=dtype)], [own.y.new_zeros(0, dtype=dtype)]
        with engine.evaluation_mode():
            for start in range(0, len(pairs), chunk_size):
                i, j = pairs[start : start + chunk_size].unbind(1)
                y_a, y_b = (dense_labels(y, mixtures.num_classes, dtype) for y in (own.y[i], other.y[j]))
                mixed = mix_trees(take(own.x, i), other.x, j, lam), lam * y_a + (1 - lam) * y_b
                for part in derivatives_of(engine, "the mixed samples", mixed, gradient, norms=True):
                    assert part.norm is not None
                    inner.append(part.inner)
                    norm.append(part.norm)
        return torch.cat(inner), torch.cat(norm)
