"""The engine of all gradient functions: checks, plans, projections, and passes over chunks of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradmix.gradients.accumulators import Accumulator, ClassSketches, SampleSketches
from gradmix.gradients.backward import run_pass
from gradmix.gradients.by_class import ClassGradients
from gradmix.gradients.chunk import Chunk
from gradmix.gradients.class_passes import LEAST_SAMPLES, MOST_CLASSES, class_sums
from gradmix.gradients.exact import Gradients, LossGradients, exact_gradients
from gradmix.gradients.exceptions import MovedSamplesError, OutdatedPlanError
from gradmix.gradients.layers import Layer, select_parameters, single_layers, trainable_parameters
from gradmix.gradients.layout import LayerSketch, Layout, layout_of, projections_for
from gradmix.gradients.losses import Loss, cross_entropy, loss_scale
from gradmix.gradients.plan import Plan, plan_without_rules
from gradmix.gradients.planner import plan_for
from gradmix.gradients.settings import EngineSettings
from gradmix.gradients.sketches import Identity, as_sketch
from gradmix.model.inputs import InputTree, first_tensor, map_tensors, num_samples, take, tensors_of
from gradmix.model.unchanged import device_of, leave_unchanged, require_finite, unwrap, without_gradient_hooks
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import check_label_range, check_labels, class_of
from gradmix.replay.sources import chunks_with_numbers
from gradmix.runtime.collectives import Group

T = TypeVar("T")

MEMORY_FACTOR = 3
"""Ratio of the bytes that a pass needs for a sample to those of all layers' outputs, approximately, for autograd."""


class Engine:
    """Computes gradients of a model's samples.

    Args:
        model: may be wrapped (DataParallel, compiled).
        settings: the settings of the gradients.

    Attributes:
        model: the unwrapped model.
        settings: the settings of the gradients.
        sketch: the sketch of the settings.
        layout: the place of each layer in a sketched gradient; set by the first :meth:`prepare`.
        projections: the projections of the layout.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    layout: Layout

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        settings.check()
        model = unwrap(model)
        if any(p.is_inference() for p in model.parameters()):
            raise ValueError("model: was made in torch.inference_mode, expected parameters that can have gradients")
        loss_scale(settings.scaler, device_of(model))
        self.model, self.settings = model, settings
        self.sketch = as_sketch(settings.sketch, settings.rank, settings.seed)
        self._layout_is_final = False
        self._dtype: torch.dtype | None = None

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Put the model into evaluation mode, without gradient hooks and outside inference mode; restore it after."""
        with (
            torch.inference_mode(False),
            leave_unchanged(self.model),
            without_gradient_hooks(self.model),
            _backward_of_recurrent_layers(self.model),
        ):
            yield

    # --------------------------------------------------------------------------------------------- plan and layout

    def prepare(self, x: InputTree, *, anew: bool = False) -> Plan:
        """Return the plan for samples like those of x, and set the layout and the projections.

        Raises:
            OutdatedPlanError: the plan has other layers than that of the samples before.
        """
        plan = plan_for(self.model, x, self.settings.layers, self.settings.without_rule, anew=anew)
        self._set_layout(plan)
        return plan

    def plan_of(self, x: InputTree) -> Plan:
        """Return the plan for samples like those of x, outside of a pass."""
        with self.evaluation_mode():
            return self.prepare(map_tensors(_without_inference, x))

    def _set_layout(self, plan: Plan) -> None:
        layout = layout_of([*plan.layers, *plan.exact], self.sketch)
        if getattr(self, "layout", None) == layout:
            return
        if self._layout_is_final:
            raise OutdatedPlanError("other layers than for the samples before")
        self.layout = layout
        self.projections = projections_for(self.model, layout, self.sketch, self.settings.backend)

    def _plan_without_rules(self, num_classes: int) -> Plan:
        """Return a plan that watches no call, of the present layers, or at first of all chosen parameters."""
        if self._layout_is_final:
            layers = tuple(Layer(layer.name, layer.parameters, layer.shape) for layer in self.layout)
        else:
            trainable = trainable_parameters(self.model)
            layers = single_layers(trainable, select_parameters(trainable, self.settings.layers))
        result = plan_without_rules(layers, num_classes)
        self._set_layout(result)
        return result

    def with_plan(self, function: Callable[[Chunk, Plan], T], chunk: Chunk) -> T:
        """Call ``function`` with the chunk and its plan; again with a new plan if the model no longer fits the plan.

        If the new plan does not fit either, the model's calls depend on the samples' values, and the plan without rules
        is used, if the settings allow it.
        """
        result = self._with_plan(function, chunk)
        self._layout_is_final = True
        return result

    def _with_plan(self, function: Callable[[Chunk, Plan], T], chunk: Chunk) -> T:
        exact = self.settings.without_rule == "exact"
        try:
            return function(chunk, self.prepare(chunk.x))
        except OutdatedPlanError:
            pass
        except MovedSamplesError:
            if not exact:
                raise
        try:
            return function(chunk, self.prepare(chunk.x, anew=True))
        except (OutdatedPlanError, MovedSamplesError) as error:
            if not exact:
                if isinstance(error, MovedSamplesError):
                    raise
                raise ValueError(
                    f"model: does not make the same calls in every forward pass ({error}), expected a forward pass "
                    "that does not depend on the values in the samples. Have the gradients computed sample by sample "
                    "(slower) with without_rule='exact'"
                ) from None
        plan = plan_for(self.model, chunk.x, self.settings.layers, self.settings.without_rule)
        return function(chunk, self._plan_without_rules(plan.num_classes))

    # -------------------------------------------------------------------------------------------- sizes and dtypes

    @property
    def size(self) -> int:
        """D, the number of entries of a sketched gradient."""
        return self.layout[-1].stop

    def dtype(self) -> torch.dtype:
        """Return the dtype of sketches and sums: float64 for a float64 model, else float32."""
        if self._dtype is None:
            self._dtype = work_dtype(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))
        return self._dtype

    def zeros(self, like: InputTree, *shape: int) -> Tensor:
        """Return zeros (N, *shape) on the device of ``like`` (N, ...), of the dtype of sketches and sums."""
        return torch.zeros(num_samples(like), *shape, dtype=self.dtype(), device=first_tensor(like).device)

    def _results(self, like: InputTree, plan: Plan, size: int) -> Tensor:
        """Return (N, size): zeros if no layer has a rule, otherwise memory that the accumulators write in full."""
        new = torch.empty if plan.layers else torch.zeros
        return new(num_samples(like), size, dtype=self.dtype(), device=first_tensor(like).device)

    def samples_within(self, memory: int, plan: Plan) -> int:
        """Return the number of samples per pass that need about ``memory`` bytes; from 1 to the chunk size."""
        return max(1, min(self.settings.chunk_size, memory // max(1, MEMORY_FACTOR * plan.sample_bytes)))

    def scale(self, x: InputTree) -> float:
        """Return the factor of the loss in the backward pass."""
        return loss_scale(self.settings.scaler, first_tensor(x).device)

    # --------------------------------------------------------------------------------------------------- one chunk

    def losses(self, chunk: Chunk) -> Loss:
        """Return the loss of a chunk's samples; that of cross-entropy checks logits and labels."""
        if self.settings.loss is not None:
            return self.settings.loss

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            if logits.ndim != 2:
                samples = len(logits)
                raise ValueError(
                    f"model: returned logits of shape {tuple(logits.shape)} for {samples} samples, expected "
                    f"({samples}, C), or a loss= that takes them"
                )
            check_label_range(chunk.name, labels, logits.shape[1], chunk.start)
            return cross_entropy(logits, labels)

        return loss

    def check_labels(self, chunk: Chunk, classes: int) -> None:
        """Raise ValueError if a label of cross-entropy is beyond the classes: on a GPU it would end the context."""
        if self.settings.loss is None:
            check_label_range(chunk.name, chunk.y, classes, chunk.start)

    def run(self, chunk: Chunk, plan: Plan, accumulators: Sequence[Accumulator]) -> None:
        """Make a forward and a backward pass, if any layer has a rule: :func:`gradmix.gradients.backward.run_pass`."""
        if plan.layers:
            loss, scale = self.losses(chunk), self.scale(chunk.x)
            run_pass(self.model, plan, chunk, accumulators, loss=loss, scale=scale)

    def exact(self, chunk: Chunk, plan: Plan) -> Iterator[tuple[slice, Gradients]]:
        """Yield slices of the samples with the gradients of the parameters without a rule.

        See :func:`gradmix.gradients.exact.exact_gradients`.
        """
        if not plan.exact:
            return
        own = {n for layer in plan.exact for n in layer.parameters}
        # If no layer has a rule, a gradient of a parameter outside the layout would be lost.
        placed = {n for layer in self.layout for n in layer.parameters}
        trainable = trainable_parameters(self.model)
        selected = [] if plan.layers else select_parameters(trainable, self.settings.layers)
        others = [n for n in selected if n not in placed]
        names = [n for n in trainable if n in own or n in others]
        loss, checked = self.settings.loss or cross_entropy, self.losses(chunk)
        scale = self.scale(chunk.x)
        for part, gradients in exact_gradients(self.model, names, chunk, loss, checked_loss=checked, scale=scale):
            for n in others:
                used = gradients[n].reshape(len(gradients[n]), -1).any(1)
                if bool(used.any()):
                    index = chunk.start + part.start + int(used.int().argmax())
                    raise ValueError(
                        f"{chunk.name}: {n!r} is used by sample {index} and by none of the chunks before, expected "
                        "chunks that use the same parameters; a larger chunk_size= helps"
                    )
            yield part, gradients

    def _exact_sketches(self, chunk: Chunk, plan: Plan) -> Iterator[tuple[slice, LayerSketch, int, Tensor]]:
        """Yield slice of samples, layer, its index and sketches (n, rows, columns), for the layers without a rule."""
        own = {layer.name for layer in plan.exact}
        for part, gradients in self.exact(chunk, plan):
            for index, layer in enumerate(self.layout):
                if layer.name in own:
                    yield part, layer, index, self._sketch_layer(layer, gradients)

    def _sketch_layer(self, layer: LayerSketch, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the sketches (n, rows, columns) of one layer's gradients (n, *shape), given by parameter name."""
        left, right = self.projections.of(layer.name)
        blocks = [
            gradients[n].reshape(-1, layer.shape[0], gradients[n][0].numel() // layer.shape[0])
            for n in layer.parameters
        ]
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
        return right.reduce(left.reduce(whole.to(self.dtype()), 0, 1), 0, 2)

    def _sample_sketches(self, chunk: Chunk, plan: Plan) -> Tensor:
        """Return the sketched gradients (n, D) of a chunk's samples."""
        out = self._results(chunk.x, plan, self.size)
        self.run(chunk, plan, [SampleSketches(plan, self.projections, out, self.scale(chunk.x))])
        for part, layer, _, sketches in self._exact_sketches(chunk, plan):
            out[part, layer.start : layer.stop] = sketches.flatten(1)
        self._require_finite(chunk.name, out)
        return out

    def _class_sketches(self, chunk: Chunk, plan: Plan) -> ClassGradients:
        """Return the sketched gradients of a chunk's samples, summed by class."""
        y = chunk.y if self.settings.loss is None else _classes_of_targets(chunk)
        classes, labels, counts = class_of(y).unique(return_inverse=True, return_counts=True)
        sums, squares = (self._results(classes, plan, size) for size in (self.size, len(self.layout)))
        norms = self.settings.norms
        if (
            not norms
            and self._prefers_class_passes(chunk, plan, len(classes))
            and self._sum_by_class_passes(chunk, plan, labels, sums)
        ):
            ways = ["pass per class"]
        else:
            accumulator = ClassSketches(plan, self.projections, labels, sums, squares, self.scale(chunk.x))
            self.run(chunk, plan, [accumulator])
            for part, layer, index, sketches in self._exact_sketches(chunk, plan):
                flat = sketches.flatten(1)
                sums[:, layer.start : layer.stop].index_add_(0, labels[part], flat)
                squares[:, index].index_add_(0, labels[part], flat.square().sum(1))
            self._require_finite(chunk.name, sums)
            ways = [way for way, layers in (("layer rules", plan.layers), ("per sample", plan.exact)) if layers]
        sketch = self.sketch.describe()
        return ClassGradients(classes, sums, counts, squares if norms else None, self.layout, sketch, frozenset(ways))

    def _prefers_class_passes(self, chunk: Chunk, plan: Plan, classes: int) -> bool:
        """Whether a pass for each class is to be tried, because it is faster.

        With layer rules that was measured in full precision on a CPU (bench/exact_gradients.py); in half precision the
        sums would be rounded. Without, it is faster than a pass for each sample, but not than ``torch.func``.
        """
        if plan.exact:
            return len(chunk) >= LEAST_SAMPLES * classes and not self._is_vectorised(chunk, plan)
        if plan.draws_random_numbers or plan.half_precision:
            return False
        device = first_tensor(chunk.x).device.type
        if classes > MOST_CLASSES or device != "cpu" or not isinstance(self.sketch, Identity):
            return False
        dtypes = {p.dtype for p in trainable_parameters(self.model).values()}
        return dtypes == {self.dtype()} and not torch.is_autocast_enabled(device)

    def _is_vectorised(self, chunk: Chunk, plan: Plan) -> bool:
        """Whether ``torch.func`` computes all samples at once, tried on two."""
        if plan.vectorised is None:
            self.check_labels(chunk, plan.num_classes)
            trainable = trainable_parameters(self.model)
            wanted = {n: trainable[n] for layer in plan.exact for n in layer.parameters}
            few = LossGradients(self.model, wanted, self.settings.loss or cross_entropy, self.scale(chunk.x))
            x, y = (take(part, slice(2)) for part in (chunk.x, chunk.y))
            plan.vectorised = few.samples_by_vmap(x, y, loops=False) is not None
        return plan.vectorised

    def _sum_by_class_passes(self, chunk: Chunk, plan: Plan, labels: Tensor, sums: Tensor) -> bool:
        """Write the sums (P, D) of sketches by a pass for each class.

        Returns:
            False if a check or the model failed; the sums are then 0, to be computed in the other way. Its checks, of
            all samples again, decide whether there is an error, and name the sample in the data.
        """
        trainable = trainable_parameters(self.model)
        names = select_parameters(trainable, self.settings.layers)
        placed = {n for layer in self.layout for n in layer.parameters}
        passes = LossGradients(self.model, {n: trainable[n] for n in names}, self.losses(chunk), self.scale(chunk.x))
        plan.passes += 1
        all_samples = bool(plan.exact) or not plan.verified_by_class
        try:
            for p, found in enumerate(class_sums(passes, chunk, labels, plan.passes, all_samples=all_samples)):
                gradients = {n: gradient[None] for n, gradient in zip(names, found, strict=True)}
                if any(bool(gradients[n].any()) for n in names if n not in placed):
                    raise OutdatedPlanError("a parameter used that has no place in the layout")
                for layer in self.layout:
                    sums[p, layer.start : layer.stop] = self._sketch_layer(layer, gradients).flatten()
            if passes.scale != 1.0:
                sums /= passes.scale
            if not bool(torch.isfinite(sums.sum())):
                raise OutdatedPlanError("a sum that is not finite: in half precision the samples' gradients may be")
        except Exception:
            plan.verified = plan.verified_by_class = False
            sums.zero_()
            return False
        plan.verified_by_class = True
        return True

    def _require_finite(self, name: str, vectors: Tensor) -> None:
        if bool(torch.isfinite(vectors.sum())):
            return
        for layer in self.layout:
            if not bool(torch.isfinite(vectors[:, layer.start : layer.stop]).all()):
                raise ValueError(
                    f"{name}: the gradient of layer {layer.name!r} holds a NaN or an infinity, expected finite values "
                    "(in float16 a smaller scaler= helps)"
                )

    # -------------------------------------------------------------------------------------------------- all chunks

    def chunks(self, name: str, source: object, group: Group = None) -> Iterator[Chunk]:
        """Yield the non-empty chunks of the samples; with a group, those of this process's share."""
        device, any_targets = device_of(self.model), self.settings.loss is not None
        size = self.settings.chunk_size
        for start, x, y in chunks_with_numbers(name, source, size, device, group, any_targets=any_targets):
            if num_samples(x):
                for leaf in tensors_of(x):
                    require_finite(start, **{name: leaf})
                yield Chunk(name, start, map_tensors(_without_inference, x), map_tensors(_without_inference, y))

    def samples(self, name: str, source: object) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the chunks of the samples with their sketched gradients (n, D); inside :meth:`evaluation_mode`."""
        for chunk in self.chunks(name, source):
            yield chunk, self.with_plan(self._sample_sketches, chunk)

    def classes(self, name: str, source: object) -> ClassGradients | None:
        """Return the sums by class over all samples, None if there are none; inside :meth:`evaluation_mode`."""
        total: ClassGradients | None = None
        for chunk in self.chunks(name, source):
            part = self.with_plan(self._class_sketches, chunk)
            total = part if total is None else total.add_(part)
        return total

    def sketch_of(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch (D,) of a gradient given by parameter name; call it after a pass, which sets the layers."""
        one = {name: value[None] for name, value in gradient.items()}
        return torch.cat([self._sketch_layer(layer, one).flatten() for layer in self.layout])


@contextmanager
def _backward_of_recurrent_layers(model: nn.Module) -> Iterator[None]:
    """Disable cuDNN for a model with recurrent layers, which in cuDNN have no backward pass in evaluation mode."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    if not before or not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = before


def _without_inference(leaf: Tensor) -> Tensor:
    """Return the tensor, or a copy if it is of inference mode and cannot be kept for a backward pass."""
    return leaf.clone() if leaf.is_inference() else leaf


def _classes_of_targets(chunk: Chunk) -> Tensor:
    """Return the targets of a loss of the user's own as labels, if they are classes of the samples."""
    y = chunk.y
    try:
        whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        labels: Tensor = y.long() if whole else y
        check_labels(f"{chunk.name} labels", labels, len(chunk), None)
        return labels
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error}, to sum by. sample_gradients takes any y that loss= does: sum its vectors by classes of your own"
        ) from None
