"""Sketched gradients of samples and of classes: the public functions, and what they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from gradmix.checks import check_count
from gradmix.gradients.by_class import ClassGradients
from gradmix.gradients.by_sample import SampleGradients
from gradmix.gradients.consumers import (
    ClassSketches,
    LayerSketch,
    SampleSketches,
    Sides,
    layout_of,
)
from gradmix.gradients.exact import Gradients, exact_gradients
from gradmix.gradients.passes import Consumer, Loss, cross_entropy, loss_scale, run_pass
from gradmix.gradients.plan import (
    Layer,
    MovedRowsError,
    OutdatedPlanError,
    Plan,
    WithoutRule,
    plan_for,
    plan_without_rules,
    select,
    single_layers,
    trainable_parameters,
)
from gradmix.gradients.sketches import KINDS, Identity, Sketch, as_sketch
from gradmix.inputs import InputTree, first_tensor, map_tensors, num_samples, tensors_of
from gradmix.ops.backends import check_backend
from gradmix.ops.dtypes import work_dtype
from gradmix.ops.labels import check_label_range, check_labels, class_of
from gradmix.probe import device_of, require_finite, untouched, unwrap, without_gradient_hooks
from gradmix.processes import Group
from gradmix.replay.sources import SampleSource as RowSource
from gradmix.replay.sources import as_pair, numbered_chunks

Scaler: TypeAlias = "float | torch.amp.GradScaler | None"

T = TypeVar("T")

ROW_FACTOR = 3
"""Bytes that a pass needs for a row, over those of all its layers' outputs: what autograd keeps in between, roughly."""

CHUNK = 256
"""Rows of one forward and backward pass unless the caller says otherwise."""


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
    """Sketched gradients of single rows, without ever forming a weight's gradient.

    Row n's gradient G_n of each layer's parameters, as a (p x q) matrix, becomes L G_n R^T (see
    :class:`gradmix.gradients.Sketch`). The loss is not averaged: a row's gradient does not depend on the rows around.

    Args:
        model, layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend: as :func:`class_gradients`.
        batch: x and y as the data of :func:`class_gradients`; with ``loss``, y is whatever that takes.

    Returns:
        :class:`gradmix.gradients.SampleGradients` of N rows.

    Raises:
        As :func:`class_gradients`.

    >>> import torch, gradmix
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> batch = torch.randn(8, 64), torch.arange(8)
    >>> gradmix.sample_gradients(model, batch, rank=16).cosine().shape
    torch.Size([8, 8])
    """
    x, y = as_pair("batch", batch, any_targets=loss is not None)
    if num_samples(x) == 0:
        raise ValueError("batch: got no rows, expected at least one")
    engine = Engine.of(model, layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend)
    with engine.probing():
        parts = [part for _, _, part in engine.samples("batch", (x, y))]
    vectors = parts[0] if len(parts) == 1 else torch.cat(parts)
    return SampleGradients(vectors, engine.layout, engine.sketch.describe())


def class_gradients(
    model: nn.Module,
    data: RowSource,
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
) -> ClassGradients:
    """Sketched gradients summed by class, over any number of rows, in memory that does not grow with them.

    Costs one forward pass and a backward pass without weight gradients. The model runs in evaluation mode (dropout off,
    BatchNorm by its running statistics), under the autocast that is active where this is called, and is left as it was.
    The gradients are those of the loss: hooks on a parameter's gradient (``Tensor.register_hook``) are not called.
    Its rows must not influence each other, and inside it they must not be put into an order that depends on what is in
    them (sorted by length, routed to experts): every pass is checked for that on a few rows, and the first one of each
    shape on all (:mod:`gradmix.gradients.row_check` says how, and what escapes).

    Memory beyond the model's and the data's own: for each chunk of B rows, what autograd keeps of the forward pass
    without the inputs of linear layers and convolutions, plus ``4 B sum_l T_l c_l`` bytes of sketched activations (T_l
    positions of layer l, 1 for a linear layer on vectors; c_l its sketch's columns, the rank in layers larger than it),
    plus what one layer needs at a time: the gradients of its input and output, and ``4 B T_l (r_l + c_l) +
    4 B r_l c_l``; and ``4 P D + 4 P L`` for the sums over P classes, ``4 sum_l (r_l p_l + c_l q_l)`` for the matrices,
    which are kept for the next call as long as the model lives.

    Args:
        model: returns logits (N, C), or an object that holds them as ``.logits``. With ``loss``, the logits may have
            any shape (N, ...). It is called with x alone: a mapping is given by keyword, a tuple or list by position,
            to a model that takes them so.
        data: a ReplayBuffer, an ``(x, y)`` pair, a Dataset or a DataLoader; x a tensor (N, ...) of any dtype, or a
            mapping, tuple or list of such tensors; y (N,) int64 class indices, or (N, C) label vectors, whose largest
            entry is then the row's class.
        layers: ``"all"`` parameters that require gradients, or patterns (as in the shell) of the names of modules or
            parameters: ``["layer4", "fc"]``.
        rank: k; a layer's sketch has about k * k entries. The cosines of a whole network's gradients are off by about
            1/k, those of a single layer by 1/k to 1/sqrt(k) (see :mod:`gradmix.gradients.sketches`). Or a mapping from
            patterns of layers' names to ranks.
        seed: of the sketch. Only sketches of the same seed, ranks and kind can be compared.
        sketch: ``"rademacher"``, ``"gaussian"``, ``"rows"``, ``"identity"`` (no sketch: exact), or a
            :class:`gradmix.gradients.Sketch` of your own, which brings its rank and seed.
        loss: from logits (N, ...) and y to the rows' losses (N,); None: cross-entropy.
        without_rule: what to do with parameters for which there is no layer rule: ``"error"``, or ``"exact"``: compute
            their gradients row by row. It costs two to three more passes, by ``torch.func``; where that cannot run the
            model (recurrent layers, packed sequences, tokens routed by what is in them), a loop over the rows, of as
            many passes. Its memory is that of a training step on the chunk, plus 128 MiB of gradients or those of one
            row. That rows have the same gradient alone and together is checked by their sum.
        scaler: a GradScaler or a factor for the loss, divided out again; for float16, whose small gradients would
            vanish. None: 1, or 1024 under float16 autocast.
        chunk_size: rows of one pass (a DataLoader keeps its own batch size up to this).
        backend: of the operators ``class_sketch`` and ``sketch_project``.

    Returns:
        :class:`gradmix.gradients.ClassGradients` of the classes that occur.

    Raises:
        ValueError: no rows, labels out of range, y that are no classes, a NaN (its row is named), a layer without a
            rule (``NoRuleError``), rows that influence each other (``CoupledRowsError``), statistics of the batch
            (``BatchStatisticsError``).
        TypeError: an argument of the wrong type.

    >>> import torch, gradmix
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> first = gradmix.class_gradients(model, (torch.randn(8, 64), torch.arange(8) % 2))
    >>> second = gradmix.class_gradients(model, (torch.randn(8, 64), torch.arange(8) % 3))
    >>> both = first + second
    >>> both.classes, both.counts
    (tensor([0, 1, 2]), tensor([7, 7, 2]))
    """
    engine = Engine.of(model, layers, rank, seed, sketch, loss, without_rule, scaler, chunk_size, backend)
    with engine.probing():
        total = engine.classes("data", data)
    if total is None:
        raise ValueError("data: got no rows, expected at least one")
    return total


@contextmanager
def _recurrent_backward(model: nn.Module) -> Iterator[None]:
    """Do without cuDNN in a model with recurrent layers: its own have no backward pass in evaluation mode."""
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


def _out_of_inference(leaf: Tensor) -> Tensor:
    """The tensor, or a copy of one of inference mode, which cannot be kept for a backward pass."""
    return leaf.clone() if leaf.is_inference() else leaf


def _classes_of_targets(name: str, y: Any, rows: int) -> Tensor:
    """Targets of a loss of the user's own as labels, if they say what class each row is of."""
    try:
        whole = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        labels: Tensor = y.long() if whole else y
        check_labels(f"{name} labels", labels, rows, None)
        return labels
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error}, to sum by. sample_gradients takes any y that loss= does: sum its vectors by classes of your own"
        ) from None


_sides: weakref.WeakKeyDictionary[nn.Module, dict[object, Sides]] = weakref.WeakKeyDictionary()
_KEPT = 8
"""Sketches of a model whose matrices are kept from call to call."""


def _sides_of(model: nn.Module, layout: tuple[LayerSketch, ...], sketch: Sketch, backend: str) -> Sides:
    """The sketch's matrices: those of an earlier call for this model, if they are the same."""
    # Of a sketch that a user wrote only the object itself says what its matrices are.
    same = repr(sketch.describe()) if type(sketch) in KINDS.values() else sketch
    key = (layout, same, backend)
    known = _sides.setdefault(model, {})
    sides = known.pop(key, None) or Sides(layout, sketch, backend)
    if not isinstance(sketch, Identity):
        known[key] = sides  # the latest last
        while len(known) > _KEPT:
            del known[next(iter(known))]
    return sides


@dataclass
class Engine:
    """The checked arguments of the functions above, with what is made once: the plan, the layout and the matrices.

    Attributes:
        loss: None: cross-entropy, for which logits and labels are checked.
        settled: whether gradients have been made, so that the layout is to stay.
    """

    model: nn.Module
    layers: str | Sequence[str]
    sketch: Sketch
    loss: Loss | None
    without_rule: WithoutRule
    scaler: Scaler
    chunk: int
    backend: str
    settled: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: str | Sequence[str],
        rank: int | Mapping[str, int],
        seed: int,
        sketch: str | Sketch,
        loss: Loss | None,
        without_rule: WithoutRule,
        scaler: Scaler,
        chunk: int,
        backend: str,
    ) -> Engine:
        """Check the arguments."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        if without_rule not in get_args(WithoutRule):
            allowed = " or ".join(map(repr, get_args(WithoutRule)))
            raise ValueError(f"without_rule: got {without_rule!r}, expected {allowed}")
        check_count("chunk_size", chunk)
        check_backend(backend)
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a callable or None")
        model = unwrap(model)
        if any(p.is_inference() for p in model.parameters()):
            raise ValueError("model: was made in torch.inference_mode, expected parameters that can have gradients")
        loss_scale(scaler, device_of(model))
        return cls(model, layers, as_sketch(sketch, rank, seed), loss, without_rule, scaler, chunk, backend)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """The model in evaluation mode, without hooks on gradients, out of inference mode; restored afterwards."""
        with (
            torch.inference_mode(False),
            untouched(self.model),
            without_gradient_hooks(self.model),
            _recurrent_backward(self.model),
        ):
            yield

    # ------------------------------------------------------------------------------------------------------ one batch

    def prepare(self, x: InputTree, *, anew: bool = False) -> Plan:
        """The plan for such rows; makes the layout and, when it changed, the sides.

        Raises:
            OutdatedPlanError: the plan has other layers than the rows before.
        """
        plan = plan_for(self.model, x, self.layers, self.without_rule, anew=anew)
        self._lay_out(plan)
        return plan

    def _lay_out(self, plan: Plan) -> None:
        layout = layout_of([*plan.layers, *plan.exact], self.sketch)
        if getattr(self, "layout", None) == layout:
            return
        if self.settled:
            raise OutdatedPlanError("other layers than for the rows before")
        self.layout: tuple[LayerSketch, ...] = layout
        self.sides = _sides_of(self.model, layout, self.sketch, self.backend)

    def _row_by_row(self, plan: Plan) -> Plan:
        """A plan of the same layers, or of all chosen parameters before there are any, that watches no call."""
        if self.settled:
            layers = tuple(Layer(place.name, place.parameters, place.shape) for place in self.layout)
        else:
            trainable = trainable_parameters(self.model)
            layers = single_layers(trainable, select(trainable, self.layers))
        result = plan_without_rules(layers, plan.classes)
        self._lay_out(result)
        return result

    @property
    def width(self) -> int:
        """D: entries of a sketched gradient."""
        return self.layout[-1].stop

    def dtype(self) -> torch.dtype:
        """Of sketches and sums: float64 for a float64 model, else float32."""
        return work_dtype(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))

    def chunks(self, name: str, source: object, group: Group = None) -> Iterator[tuple[int, Any, Any]]:
        """First row, x and y of each chunk that is not empty; of a group, this process's share of them."""
        device, any_targets = device_of(self.model), self.loss is not None
        for start, x, y in numbered_chunks(name, source, self.chunk, device, group, any_targets=any_targets):
            if num_samples(x):
                for leaf in tensors_of(x):
                    require_finite(start, **{name: leaf})
                yield start, map_tensors(_out_of_inference, x), map_tensors(_out_of_inference, y)

    def losses(self, name: str, start: int) -> Loss:
        """The rows' losses; for cross-entropy, logits and labels are checked."""
        if self.loss is not None:
            return self.loss

        def checked(logits: Tensor, labels: Tensor) -> Tensor:
            if logits.ndim != 2:
                rows = len(logits)
                raise ValueError(
                    f"model: returned logits of shape {tuple(logits.shape)} for {rows} rows, expected ({rows}, C), or "
                    "a loss= that takes them"
                )
            check_label_range(name, labels, logits.shape[1], start)
            return cross_entropy(logits, labels)

        return checked

    def run(self, name: str, start: int, x: InputTree, y: Any, plan: Plan, consumers: Sequence[Consumer]) -> None:
        """One forward and one backward pass, if any layer has a rule: :func:`gradmix.gradients.passes.run_pass`."""
        if plan.layers:
            loss, scale = self.losses(name, start), self.scale(x)
            run_pass(self.model, plan, x, y, consumers, loss=loss, scale=scale, name=name, first_row=start)

    def scale(self, x: InputTree) -> float:
        """Factor of the loss in the backward pass."""
        return loss_scale(self.scaler, first_tensor(x).device)

    def exact(self, name: str, start: int, x: InputTree, y: Any, plan: Plan) -> Iterator[tuple[slice, Gradients]]:
        """Rows and gradients of the parameters without a rule: :func:`gradmix.gradients.exact.exact_gradients`."""
        if not plan.exact:
            return
        own = {n for layer in plan.exact for n in layer.parameters}
        # Without any rules, no parameter may have a gradient that the layout has no place for.
        placed = {n for place in self.layout for n in place.parameters}
        trainable = trainable_parameters(self.model)
        others = [] if plan.layers else [n for n in select(trainable, self.layers) if n not in placed]
        names = [n for n in trainable if n in own or n in others]
        for part, gradients in exact_gradients(
            self.model,
            names,
            x,
            y,
            self.loss or cross_entropy,
            checked_loss=self.losses(name, start),
            scale=self.scale(x),
            name=name,
            first_row=start,
        ):
            for n in others:
                used = gradients[n].reshape(len(gradients[n]), -1).any(1)
                if bool(used.any()):
                    raise ValueError(
                        f"{name}: {n!r} is used by row {start + part.start + int(used.int().argmax())} and by none of "
                        "the chunks before, expected chunks that use the same parameters; a larger chunk_size= helps"
                    )
            yield part, gradients

    def _exact_sketches(
        self, name: str, start: int, x: InputTree, y: Any, plan: Plan
    ) -> Iterator[tuple[slice, LayerSketch, int, Tensor]]:
        """Rows, place, index of the layer and sketches (n, rows, columns), for the layers without a rule."""
        own = {layer.name for layer in plan.exact}
        for part, gradients in self.exact(name, start, x, y, plan):
            for index, place in enumerate(self.layout):
                if place.name in own:
                    yield part, place, index, self._sketched(place, gradients)

    def _sketched(self, place: LayerSketch, gradients: Mapping[str, Tensor]) -> Tensor:
        """(n, rows, columns): one layer's sketches, of gradients (n, *shape) by parameter name."""
        left, right = self.sides.of(place.name)
        blocks = [
            gradients[n].reshape(-1, place.shape[0], gradients[n][0].numel() // place.shape[0])
            for n in place.parameters
        ]
        return right.reduce(left.reduce(torch.cat(blocks, 2).to(self.dtype()), 0, 1), 0, 2)

    # ---------------------------------------------------------------------------------------------------- all batches

    def samples(self, name: str, source: object) -> Iterator[tuple[Any, Any, Tensor]]:
        """x, y and sketched gradients (n, D) of each chunk of the rows; inside :meth:`probing`."""
        for start, x, y in self.chunks(name, source):

            def run(plan: Plan, start: int = start, x: InputTree = x, y: Any = y) -> Tensor:
                return self._sample_chunk(name, start, x, y, plan)

            yield x, y, self.retried(run, x)

    def _sample_chunk(self, name: str, start: int, x: InputTree, y: Any, plan: Plan) -> Tensor:
        out = self.zeros(x, self.width)
        consumer = SampleSketches(plan, self.layout, self.sides, out, self.scale(x))
        self.run(name, start, x, y, plan, [consumer])
        for part, place, _, sketches in self._exact_sketches(name, start, x, y, plan):
            out[part, place.start : place.stop] = sketches.flatten(1)
        self._require_finite(name, out)
        return out

    def classes(self, name: str, source: object) -> ClassGradients | None:
        """Sums by class over all rows; None if there are none; inside :meth:`probing`."""
        total: ClassGradients | None = None
        for start, x, y in self.chunks(name, source):

            def run(plan: Plan, start: int = start, x: InputTree = x, y: Any = y) -> ClassGradients:
                return self._class_chunk(name, start, x, y, plan)

            part = self.retried(run, x)
            total = part if total is None else total.add_(part)
        return total

    def _class_chunk(self, name: str, start: int, x: InputTree, y: Any, plan: Plan) -> ClassGradients:
        if self.loss is not None:
            y = _classes_of_targets(name, y, num_samples(x))
        classes, labels, counts = class_of(y).unique(return_inverse=True, return_counts=True)
        sums, squares = (self.zeros(classes, width) for width in (self.width, len(self.layout)))
        consumer = ClassSketches(plan, self.layout, self.sides, labels, sums, squares, self.scale(x), self.backend)
        self.run(name, start, x, y, plan, [consumer])
        for part, place, index, sketches in self._exact_sketches(name, start, x, y, plan):
            flat = sketches.flatten(1)
            sums[:, place.start : place.stop].index_add_(0, labels[part], flat)
            squares[:, index].index_add_(0, labels[part], flat.square().sum(1))
        self._require_finite(name, sums)
        return ClassGradients(classes, sums, counts, squares, self.layout, self.sketch.describe())

    def sketch_of(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """(D,): the sketch of a whole gradient, given by parameter name; after a pass, when the layers are known."""
        one = {name: value[None] for name, value in gradient.items()}
        return torch.cat([self._sketched(place, one).flatten() for place in self.layout])

    def plan_of(self, x: InputTree) -> Plan:
        """The plan for rows like those of x, outside of a pass."""
        with self.probing():
            return self.prepare(map_tensors(_out_of_inference, x))

    def rows_within(self, memory: int, plan: Plan) -> int:
        """How many rows to take at a time, so that a pass needs about ``memory`` bytes; at least 1."""
        return max(1, min(self.chunk, memory // max(1, ROW_FACTOR * plan.row_bytes)))

    def zeros(self, rows: InputTree, *width: int) -> Tensor:
        """Zeros (N, *width) on the device of ``rows`` (N, ...), of the dtype of sketches and sums."""
        return torch.zeros(num_samples(rows), *width, dtype=self.dtype(), device=first_tensor(rows).device)

    def retried(self, run: Callable[[Plan], T], x: InputTree) -> T:
        """``run`` with the plan for such rows; once more with a new one, if the model has changed since it was made.

        If that does not fit either, the model's calls depend on what is in the rows, and it goes row by row where this
        is asked for.
        """
        result = self._retried(run, x)
        self.settled = True
        return result

    def _retried(self, run: Callable[[Plan], T], x: InputTree) -> T:
        try:
            return run(self.prepare(x))
        except OutdatedPlanError:
            pass
        except MovedRowsError:
            if self.without_rule == "error":
                raise
        try:
            return run(self.prepare(x, anew=True))
        except (OutdatedPlanError, MovedRowsError) as error:
            if self.without_rule == "exact":
                pass
            elif isinstance(error, MovedRowsError):
                raise
            else:
                raise ValueError(
                    f"model: does not make the same calls in every forward pass ({error}), expected a forward pass "
                    "that does not depend on the values in the rows. Have the gradients computed row by row (slower) "
                    "with without_rule='exact'"
                ) from None
        return run(self._row_by_row(plan_for(self.model, x, self.layers, self.without_rule)))

    def _require_finite(self, name: str, vectors: Tensor) -> None:
        if bool(torch.isfinite(vectors.sum())):
            return
        for place in self.layout:
            if not bool(torch.isfinite(vectors[:, place.start : place.stop]).all()):
                raise ValueError(
                    f"{name}: the gradient of layer {place.name!r} holds a NaN or an infinity, expected finite values "
                    "(in float16 a smaller scaler= helps)"
                )
