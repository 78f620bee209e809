"""Mixup, and the base of all mixing methods: the loss on mixed samples and, on request, on the original ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from gradmix.mixing_weight import draw_lam
from gradmix.model.head import HeadOutput
from gradmix.ops.labels import dense_labels
from gradmix.runtime.transfer import to_device_async
from gradmix.training.methods.base import Context, Method, Needs, StepSamples, weighted_cross_entropy
from gradmix.training.methods.mixing_space import MixSpace, Mixture, mix_space, stage_of


class Mixing(Method):
    """The base of all mixing methods: the loss on mixed samples, with ``mix.originals`` half of it on original ones.

    Attributes:
        spaces: where the method can mix (:data:`gradmix.training.methods.mixing_space.MixSpace`).

    Raises:
        ValueError: the settings name another place, or one that the model does not have.
    """

    spaces: ClassVar[tuple[MixSpace, ...]] = ("input",)
    needs = Needs(whole_step=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._space = mix_space(context.mix)
        if self._space not in self.spaces:
            expected = " or ".join(map(repr, self.spaces))
            raise ValueError(f"mix.space: got {self._space!r} for {type(self).__name__}, expected {expected}")
        if self._space != "input":
            stage_of(context.model, self._space)

    def losses(self, samples: StepSamples) -> Iterator[Tensor]:
        if not self.context.mix.originals:
            yield from self.mixed_losses(samples, None)
            return
        seen = []
        for part in self.parts(samples):
            logits, output = self.originals(samples.x[part])
            seen.append(output)
            yield 0.5 * weighted_cross_entropy(logits, samples.y[part], samples.weight[part])
        known = [output for output in seen if output is not None]
        outputs = HeadOutput(*map(torch.cat, zip(*known, strict=True))) if len(known) == len(seen) else None
        for loss in self.mixed_losses(samples, outputs):
            yield 0.5 * loss

    def mixed_losses(self, samples: StepSamples, outputs: HeadOutput | None) -> Iterator[Tensor]:
        """Yield the loss on the mixed samples, part by part; ``outputs`` as returned by :meth:`originals`."""
        x, y = self.mix(samples, outputs)
        for part in self.parts(samples):
            yield weighted_cross_entropy(self.context.model(x[part]), y[part], samples.weight[part])

    def originals(self, x: Tensor) -> tuple[Tensor, HeadOutput | None]:
        """Return the logits of the original samples, and the part of their forward pass that :meth:`mix` can use."""
        return self.context.model(x), None

    @abstractmethod
    def mix(self, samples: StepSamples, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        """Return mixed inputs and label vectors; ``outputs`` as returned by :meth:`originals`."""

    def draw_partners(self, samples: StepSamples) -> tuple[Tensor, Tensor]:
        """Draw a random partner for every sample, ``x (N, ...)`` and ``y (N,)``, by :meth:`draw_index`."""
        x, y = (samples.x, samples.y) if samples.candidates is None else samples.candidates
        index = self.draw_index(samples)
        return x[index], y[index]

    def draw_index(self, samples: StepSamples) -> Tensor:
        """Draw the (N,) indices of random partners: a permutation of the samples or candidates.

        If there are fewer candidates than samples, each sample draws one independently.
        """
        generator = self.context.generator
        y = samples.y if samples.candidates is None else samples.candidates[1]
        if len(y) >= len(samples.y):
            drawn = torch.randperm(len(y), generator=generator, device=generator.device)[: len(samples.y)]
        else:
            drawn = torch.randint(len(y), (len(samples.y),), generator=generator, device=generator.device)
        return to_device_async(drawn, samples.x.device)

    def one_hot(self, y: Tensor) -> Tensor:
        """Return label vectors (N, C) float32 of class indices (N,)."""
        return dense_labels(y, self.context.num_classes, torch.float32)


class LinearMixing(Mixing):
    """A method whose mixtures are lam x_i + (1 - lam) x_j, of inputs or of their values at a stage of the model."""

    spaces = ("input", "embedding", "feature")

    @abstractmethod
    def mixture(self, samples: StepSamples, outputs: HeadOutput | None) -> Mixture:
        """Choose partners, weights and labels; ``outputs`` as returned by :meth:`originals`."""

    def mix(self, samples: StepSamples, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        mixture = self.mixture(samples, outputs)
        return mixture.of_inputs(samples.x), mixture.y

    def mixed_losses(self, samples: StepSamples, outputs: HeadOutput | None) -> Iterator[Tensor]:
        if self._space == "input":
            yield from super().mixed_losses(samples, outputs)
            return
        mixture = self.mixture(samples, outputs)
        for part in self.parts(samples):
            logits = mixture.logits(self.context.model, self._space, samples.x, part)
            yield weighted_cross_entropy(logits, mixture.y[part], samples.weight[part])

    def draw(self, samples: StepSamples) -> tuple[Tensor | None, Tensor, Tensor]:
        """Draw random partners: the candidates' inputs or None, each partner's index (N,), and its label (N,)."""
        index = self.draw_index(samples)
        other_x, other_y = (None, samples.y) if samples.candidates is None else samples.candidates
        return other_x, index, other_y[index]


class Mixup(LinearMixing):
    """Mixup (Zhang et al. 2018): each sample is mixed with a random one, with one lam ~ Beta(alpha, alpha) per step."""

    def mixture(self, samples: StepSamples, outputs: HeadOutput | None) -> Mixture:
        lam = draw_lam(self.context.mix.alpha, self.context.generator)
        other_x, index, other_y = self.draw(samples)
        return Mixture(other_x, index, lam, lam * self.one_hot(samples.y) + (1 - lam) * self.one_hot(other_y))
