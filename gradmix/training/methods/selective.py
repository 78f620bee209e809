"""GradMix as a training method, by class and by sample, and the controls it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradmix.criteria import Alignment, Criterion
from gradmix.estimators import EstimatorName
from gradmix.mixer import GradMix
from gradmix.model.head import HeadOutput
from gradmix.model.head_capture import HeadCapture
from gradmix.model.unchanged import ModelNotFiniteError, device_of, is_compiled, leave_unchanged, unwrap
from gradmix.pairs import Pairs
from gradmix.references import reference_gradient
from gradmix.replay.sources import chunks_of
from gradmix.training.config import TrainConfig
from gradmix.training.loop.sharding import Share
from gradmix.training.loop.state_checks import require_like, require_tensor
from gradmix.training.methods.base import Context, StepSamples
from gradmix.training.methods.controls import apply_control
from gradmix.training.methods.mixing_space import Mixture, mix_space, require_mixable
from gradmix.training.methods.mixup import LinearMixing
from gradmix.training.methods.remix import remix_labels


class SelectiveMixup(LinearMixing):
    """GradMix: a sample is mixed only if the mixture's gradient does not oppose the buffer's gradient.

    If samples are not mixed at the input, the estimator is ``feature``: all others need mixed inputs.

    Attributes:
        criterion: by which pairs are judged.
        former_estimator: the default of earlier versions, with which their runs go on.
        default_reference: where it is computed anew in every step, and every step holds samples from the buffer.
        default_refresh: steps between two refreshes; 0: once per epoch.
        online_refresh: the same in a single pass.

    Raises:
        ValueError: the settings name another estimator there.
    """

    criterion: Criterion
    former_estimator: EstimatorName
    default_reference: Literal["replayed"] | None
    default_refresh: int
    online_refresh: int

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        mix = self.resolve_config(TrainConfig(mix=context.mix, replay=context.replay)).mix
        assert mix.estimator is not None and mix.estimator != "auto"
        self._mixup = GradMix(
            context.model,
            context.buffer if context.source is None else context.source,
            criterion=self.criterion,
            estimator=mix.estimator,
            alpha=mix.alpha,
            threshold=mix.threshold,
            policy=mix.policy,
            refresh=mix.refresh or "epoch",
            class_samples=mix.class_samples,
            num_classes=None if context.growing else context.num_classes,
            generator=context.generator,
            group=context.passes.group,
            shared_batch=True,
        )
        self._of_all_parameters = mix.estimator in ("jvp", "sketch")
        self._by_replayed = mix.reference == "replayed"
        self._pairs: Pairs | None = None
        self._has_selected = False

    @classmethod
    def resolve_config(cls, config: TrainConfig) -> TrainConfig:
        mix = config.mix
        space = mix_space(mix)
        estimator, reference, refresh = mix.estimator, mix.reference, mix.refresh
        if space != "input" and estimator not in (None, "auto", "feature"):
            raise ValueError(
                f"mix.estimator: got {estimator!r}, which judges mixed inputs, expected 'feature' with "
                f"mix.space: {space}"
            )
        if estimator in (None, "auto"):
            estimator = cls.former_estimator if estimator is None and space == "input" else "feature"
        if refresh is None:
            refresh = cls.online_refresh if config.data.online else cls.default_refresh
        if reference == "auto":
            # One shuffled stream holds too few replayed samples in a step.
            every_step = refresh == 1 and config.replay.stream != "shuffled"
            reference = cls.default_reference if every_step else None
        return replace(config, mix=replace(mix, estimator=estimator, reference=reference, refresh=refresh))

    def start_epoch(self) -> None:
        self._mixup.start_epoch()

    def originals(self, x: Tensor) -> tuple[Tensor, HeadOutput | None]:
        model = self.context.model
        if is_compiled(model):
            # Compiled code skips the hook that captures the head, so the selection makes its own forward pass.
            return super().originals(x)
        with HeadCapture(model, example=x[:1]) as capture:
            logits = model(x)
        return logits, capture.output

    def mixture(self, samples: StepSamples, outputs: HeadOutput | None) -> Mixture:
        pairs = self._select(samples, outputs)
        other_x = None if samples.candidates is None else samples.candidates[0]
        return Mixture(other_x, pairs.partner, pairs.lam, self._labels(pairs, samples))

    def mix(self, samples: StepSamples, outputs: HeadOutput | None) -> tuple[Tensor, Tensor]:
        # Pairs.mix keeps the inputs' dtype.
        require_mixable(samples.x)
        pairs = self._select(samples, outputs)
        x, y = pairs.mix()
        return x, self._labels(pairs, samples) if self.context.mix.remix_labels else y

    def _labels(self, pairs: Pairs, samples: StepSamples) -> Tensor:
        if not self.context.mix.remix_labels:
            return pairs.mix_labels()
        _, other_y = (None, samples.y) if samples.candidates is None else samples.candidates
        return remix_labels(self.context, pairs.lam, samples.y, other_y[pairs.partner])

    def _select(self, samples: StepSamples, outputs: HeadOutput | None) -> Pairs:
        context = self.context
        if not self._has_selected and len(context.buffer):
            self._has_selected = True
            context.clock.warm_up()
        with context.clock("selection"):
            if samples.share is not None:
                outputs = self._gather(samples.x, samples.share, outputs)
            replayed = samples.replayed if self._by_replayed else None
            pairs = self._mixup.select(
                samples.x, samples.y, candidates=samples.candidates, outputs=outputs, replayed=replayed
            )
            if context.mix.control != "none" and self._is_selected(replayed):
                pairs = apply_control(pairs, context.model, context.mix, context.generator, context.buffer.y)
        self._pairs = pairs
        return pairs

    def _is_selected(self, replayed: Tensor | None) -> bool:
        """Whether there was a reference gradient, without which all samples are mixed."""
        if replayed is not None and self.criterion == "sample":
            # It belongs to one step and is not kept.
            return bool(replayed.any())
        return self._mixup.reference is not None

    def _gather(self, x: Tensor, share: Share, outputs: HeadOutput | None) -> HeadOutput:
        """Return the head's inputs and logits for all samples, each process having forwarded its share."""
        if outputs is None:
            model = unwrap(self.context.model)
            own = x[share.mine]
            with leave_unchanged(model), self.context.passes.autocast(), HeadCapture(model, example=x[:1]) as capture:
                model(own)
            outputs = capture.output
        return HeadOutput(share.gather(outputs.features), share.gather(outputs.logits))

    def mixed_samples(self) -> Tensor | None:
        return None if self._pairs is None else self._pairs.helpful.sum()

    def class_table(self, samples: StepSamples) -> Alignment | None:
        table = self._mixup.table
        return None if table is None else table.average(self.context.mix.alpha)

    def state_dict(self) -> dict[str, Any]:
        return {"mixup": self._mixup.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._check(state["mixup"])
        self._mixup.load_state_dict(state["mixup"])

    def _check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that does not fit the model, by the name of the part."""
        known = self._mixup.state_dict()
        parts = ("age", "stale", "refreshes", "generator")
        require_like({part: state[part] for part in parts}, {part: known[part] for part in parts}, "method")
        # Earlier versions did not keep them, and before the first gradient there are none.
        shapes = state.get("shapes") or {}
        if not isinstance(shapes, Mapping) or not all(_is_shape(shape) for shape in shapes.values()):
            raise ValueError("method.shapes: got something else than the shapes of parameters")
        table, classes = state["table"], self.context.num_classes
        if state["reference"] is not None:
            self._check_reference(state["reference"])
        if table is not None:
            lams = table["lams"]
            require_like(lams, [0.0] * max(2, len(lams)), "method.table.lams")
            if sorted(set(lams)) != lams or not 0 <= lams[0] < lams[-1] <= 1:
                raise ValueError(f"method.table.lams: got {lams}, expected weights from 0 to 1, ascending")
            labels = require_tensor(table["classes"], torch.int64, (None,), "method.table.classes")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(f"method.table.classes: got labels that are none of {classes} classes")
            shape = (len(lams), len(labels), len(labels))
            dtype = getattr(table["inner"], "dtype", torch.float32)
            for name, expected in (("inner", shape), ("norm", shape), ("reference_norm", ())):
                require_tensor(table[name], dtype, expected, f"method.table.{name}")
            if "samples" in table:
                self._check_samples(table["samples"], state["reference"].shape)

    def _check_samples(self, samples: Mapping[str, Any], reference: torch.Size) -> None:
        """Refuse samples of a class table that do not fit the reference gradient."""
        classes, width = reference
        key, y, bias = "method.table.samples", samples["y"], samples["appends_one"]
        if type(bias) is not bool:
            raise ValueError(f"{key}.appends_one: got {type(bias).__name__}, expected a bool")
        soft = getattr(y, "ndim", 1) == 2
        dtype = getattr(y, "dtype", torch.float32) if soft else torch.int64
        require_tensor(y, dtype, (None, classes) if soft else (None,), f"{key}.y")
        if not soft and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"{key}.y: got labels that are none of {classes} classes")
        for name, columns in (("features", width - bias), ("logits", classes)):
            kind = getattr(samples[name], "dtype", torch.float32)
            require_tensor(samples[name], kind, (len(y), columns), f"{key}.{name}")
            if not kind.is_floating_point:
                raise ValueError(f"{key}.{name}: got {kind}, expected floats")

    def _check_reference(self, reference: Any) -> None:
        """Refuse a reference gradient that does not fit: of all parameters, or of the head that the model has."""
        model = unwrap(self.context.model)
        if self._of_all_parameters:
            known = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if not isinstance(reference, Mapping) or not set(reference) <= set(known):
                raise ValueError("method.reference: got something else than a gradient of the model's parameters")
            for name, gradient in reference.items():
                self._check_gradient(gradient, known[name].shape, f"method.reference.{name}")
            return
        if not isinstance(reference, Tensor):
            raise ValueError(f"method.reference: got {type(reference).__name__}, expected a gradient of the head")
        source = self.context.buffer if self.context.source is None else self.context.source
        # One sample is enough to find the shape.
        sample = next(chunks_of("buffer", source, 1, device_of(model)))
        try:
            head = reference_gradient(model, sample)
        except ModelNotFiniteError:
            # The run has diverged; its next step reports it.
            return
        self._check_gradient(reference, head.shape, "method.reference")

    def _check_gradient(self, gradient: Any, shape: torch.Size, key: str) -> None:
        dtype = getattr(gradient, "dtype", torch.float32)
        expected: tuple[int | None, ...] = tuple(shape)
        # The gradient of a growing head may have fewer classes.
        require_tensor(gradient, dtype, (None, *expected[1:]) if self.context.growing else expected, key)
        if not dtype.is_floating_point:
            raise ValueError(f"{key}: got {dtype}, expected floats")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)


class GradMixClass(SelectiveMixup):
    """GradMix with the paper's criterion: one decision per pair of classes, once per epoch."""

    criterion = "class"
    former_estimator = "mixed"
    # One step's samples are too few for the decisions of an epoch.
    default_reference = None
    default_refresh = 0
    # A single pass has no epochs. Twenty steps hold about as many samples as a table of ten classes needs.
    online_refresh = 20


class GradMixSample(SelectiveMixup):
    """GradMix with one decision per pair of samples, against a reference gradient of every step."""

    criterion = "sample"
    former_estimator = "feature"
    default_reference = "replayed"
    default_refresh = online_refresh = 1

    def class_table(self, samples: StepSamples) -> Alignment | None:
        # No class table is kept, so one is made of the model in its present state.
        context = self.context
        by_class = GradMix(
            context.model,
            context.buffer if context.source is None else context.source,
            criterion="class",
            alpha=context.mix.alpha,
            class_samples=context.mix.class_samples,
            generator=torch.Generator().manual_seed(0),
        )
        by_class.select(samples.x, samples.y)
        return None if by_class.table is None else by_class.table.average(context.mix.alpha)
