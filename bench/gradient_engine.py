"""Times the class sketches of a batch against one forward and backward pass, and against other ways to have them.

Every row works on the same weights and samples, BatchNorm in evaluation mode, cross-entropy summed. Most rows of the
table end with the same result: for each class the sum of its samples' sketched gradients, L G R^T for every layer, by
the same matrices L and R. The others give the samples' inner products with a direction, or are bounds. See
bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from _measure import (
    add_run_arguments,
    begin,
    check_run,
    count,
    finish,
    free_memory,
    interleaved,
    load_average,
    machine_line,
    paired_ratio,
    peak_memory,
    prepare_machine,
    quantiles,
    run_values,
    say,
    seconds_of,
    show_bytes,
    show_table,
    show_time,
    synchronize,
    warm_up,
)
from _networks import NETWORKS, NORMS, Tokens, make_network
from _peers import (
    Absent,
    SampleGradients,
    backpack_gradients,
    dattri_logra,
    kronfluence_inner,
    opacus_gradients,
    trak_projector,
    versions,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradmix
from gradmix.gradients.directions import directional_derivatives
from gradmix.gradients.sketches import Sketch, as_sketch
from gradmix.ops.class_sketch import OPERATOR as CLASS_SKETCH
from gradmix.ops.sketch_project import OPERATOR as SKETCH_PROJECT

OPERATORS = (SKETCH_PROJECT, CLASS_SKETCH)
"""The operators whose backends are compared."""

BASELINE = "forward_backward"
"""The row that the others' times are divided by."""

TRAK_COLUMNS = 8
"""Columns that TRAK's projector makes at a time; two blocks of them are timed."""

ONE_CALL = 2.5
"""Seconds: a way whose call takes longer is timed on some of the samples, if it has no gain from having all."""


T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Case:
    """The measured case.

    Attributes:
        network: a name in ``_networks.NETWORKS``.
        norm: the normalisation of a ResNet.
        batch: N, samples.
        classes: P, classes among these samples.
        rank: k, rows of the sketch's matrices on either side.
        dtype: ``"float32"``, or ``"bfloat16"`` for a forward pass under autocast.
    """

    network: str = "resnet18"
    norm: str = "batch"
    batch: int = 32
    classes: int = 10
    rank: int = 16
    dtype: str = "float32"


PRESETS = {
    "resnet18": Case(),
    "resnet50": Case("resnet50", batch=256, dtype="bfloat16"),
    "vit-b": Case("vit-b", batch=256, dtype="bfloat16"),
}
QUICK = Case("resnet-tiny", batch=8, classes=3, rank=4)


# -------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Problem:
    """One network and its samples, on one device.

    Attributes:
        model: in evaluation mode, float32.
        frozen: the same, no parameter of which asks for a gradient.
        x, y: (N, 3, H, W) and (N,): samples, and labels of which each in [0, P) occurs.
        classes: P.
        direction: by parameter, the gradient of the mean loss of N further samples.
        autocast: the dtype of the forward pass, or None for float32 throughout.
    """

    model: nn.Module
    frozen: nn.Module
    x: Tensor
    y: Tensor
    classes: int
    direction: dict[str, Tensor]
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Device of the problem."""
        return self.x.device

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, if that is asked for."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            yield

    def loss(self, model: nn.Module, rows: int | None = None) -> Tensor:
        """Summed cross-entropy of the first samples, or of all."""
        return F.cross_entropy(model(self.x[:rows]), self.y[:rows], reduction="sum")


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Samples of noise, each with its class's pattern in it; equal for equal seeds."""
    model = make_network(case.network, case.norm, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    side = NETWORKS[case.network].image
    classes = min(case.classes, case.batch)
    pattern = F.interpolate(torch.randn(classes, 3, 4, 4, generator=generator), (side, side), mode="bilinear")

    def rows() -> tuple[Tensor, Tensor]:
        y = (torch.arange(case.batch) % classes)[torch.randperm(case.batch, generator=generator)]
        noise = torch.randn(case.batch, 3, side, side, generator=generator)
        return (noise + pattern[y]).to(device), y.to(device)

    (x, y), (buffer_x, buffer_y) = rows(), rows()
    loss = F.cross_entropy(model(buffer_x), buffer_y)
    named = dict(model.named_parameters())
    direction = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    autocast = None if case.dtype == "float32" else getattr(torch, case.dtype)
    return Problem(model, copy.deepcopy(model).requires_grad_(False), x, y, classes, direction, autocast)


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Layer:
    """A layer's gradient matrix and the two that sketch it.

    Attributes:
        name: of the layer.
        parameters: whose gradients stand side by side in its matrix G.
        shape: (p, q) of G.
        left, right: L (rows, p) and R (columns, q), in the rows' dtype; None is the identity.
        start: the sketch's first entry in a vector of all layers' sketches.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]
    left: Tensor | None
    right: Tensor | None
    start: int

    @property
    def rows(self) -> int:
        """Rows of the sketch."""
        return self.shape[0] if self.left is None else len(self.left)

    @property
    def columns(self) -> int:
        """Columns of the sketch."""
        return self.shape[1] if self.right is None else len(self.right)

    @property
    def part(self) -> slice:
        """The sketch's entries in a vector of all layers' sketches."""
        return slice(self.start, self.start + self.rows * self.columns)

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(n, p, q): G of n gradients, given by parameter as (n, *its shape)."""
        parts = [gradients[name].flatten(1).unflatten(1, (self.shape[0], -1)) for name in self.parameters]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def sketch(self, matrices: Tensor) -> Tensor:
        """(n, rows, columns): L G R^T for (n, p, q), in the dtype given."""
        if self.left is not None:
            matrices = self.left.to(matrices.dtype) @ matrices
        return matrices if self.right is None else matrices @ self.right.to(matrices.dtype).T


@dataclass(frozen=True)
class Plan:
    """The layers, and with their matrices how their gradients become one vector.

    Attributes:
        rank: k.
        layers: all, or some of a network's.
        seconds: what making the matrices took.
        calls: seconds of the package's first and second call with two samples.
    """

    rank: int
    layers: tuple[Layer, ...]
    seconds: float = 0.0
    calls: tuple[float, float] = (0.0, 0.0)

    @property
    def width(self) -> int:
        """D, entries of a vector."""
        return sum(layer.rows * layer.columns for layer in self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def only(self, names: Sequence[str]) -> Plan:
        """The plan of these layers alone."""
        kept: list[Layer] = []
        for layer in self.layers:
            if layer.name in names:
                kept.append(replace(layer, start=kept[-1].part.stop if kept else 0))
        return replace(self, layers=tuple(kept))

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(n, D): sketches of n gradients, given by parameter as (n, *its shape)."""
        return torch.cat([layer.sketch(layer.matrix(gradients)).flatten(1) for layer in self.layers], 1)


def make_plan(problem: Problem, rank: int, seed: int) -> Plan:
    """The layers and sizes that the package chooses, with the matrices of its sketch."""
    two = problem.x[:2], problem.y[:2]
    calls = []
    for _ in range(2):
        start = time.perf_counter()
        layout = gradmix.class_gradients(problem.model, two, rank=rank, seed=seed).layout
        synchronize(problem.device)
        calls.append(time.perf_counter() - start)
    sketch = as_sketch("rademacher", rank, seed)
    start = time.perf_counter()
    layers = []
    for entry in layout:
        sides = zip(("left", "right"), (entry.rows, entry.columns), entry.shape, strict=True)
        left, right = (_side(sketch, entry.name, *side, problem.x) for side in sides)
        layers.append(Layer(entry.name, entry.parameters, entry.shape, left, right, entry.start))
    synchronize(problem.device)
    return Plan(rank, tuple(layers), time.perf_counter() - start, (calls[0], calls[1]))


def _side(sketch: Sketch, layer: str, side: str, size: int, dim: int, like: Tensor) -> Tensor | None:
    return None if size == dim else sketch.matrix(layer, side, size, dim, dtype=like.dtype, device=like.device)


# --------------------------------------------------------------------------------------------------------------- truth


@dataclass
class Truth:
    """Gradients of a loop over single samples in float64.

    Attributes:
        sums: by parameter, (P, *its shape): the gradients' sums over the samples of each class.
        inner: (N, L): by layer, the samples' inner products with the direction.
        squares: by rank, (P, L): sums over the samples of the squared norms of their sketches.
    """

    plans: Mapping[int, Plan]
    sums: dict[str, Tensor]
    inner: Tensor
    squares: dict[int, Tensor]
    _gram: dict[str, Tensor] = field(default_factory=dict)

    def cosines(self, names: Sequence[str]) -> Tensor:
        """(P, P): of the classes' gradients, over these layers and without a sketch."""
        layers = [layer for layer in next(iter(self.plans.values())).layers if layer.name in names]
        for layer in layers:
            if layer.name not in self._gram:
                rows = layer.matrix(self.sums).flatten(1)
                self._gram[layer.name] = rows @ rows.T
        return _cosines(sum(self._gram[layer.name] for layer in layers))  # type: ignore[arg-type]


def find_truth(problem: Problem, plans: Mapping[int, Plan]) -> Truth:
    """One forward and one backward pass a sample, in float64; the gradient inner products and sketches from these."""
    model = copy.deepcopy(problem.model).double()
    named = dict(model.named_parameters())
    layers = next(iter(plans.values())).layers
    direction = {name: value.double()[None] for name, value in problem.direction.items()}
    toward = [layer.matrix(direction)[0] for layer in layers]
    sums = {name: p.new_zeros(problem.classes, *p.shape) for name, p in named.items()}
    inner = torch.zeros(len(problem.y), len(layers), dtype=torch.float64, device=problem.device)
    squares = {rank: inner.new_zeros(problem.classes, len(layers)) for rank in plans}
    for n, label in enumerate(problem.y.tolist()):
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(problem.x[n : n + 1].double()), problem.y[n : n + 1])
        found = torch.autograd.grad(loss, list(named.values()))
        gradients = {name: gradient[None] for name, gradient in zip(named, found, strict=True)}
        for name, gradient in gradients.items():
            sums[name][label] += gradient[0]
        for k, layer in enumerate(layers):
            matrix = layer.matrix(gradients)
            inner[n, k] = (matrix[0] * toward[k]).sum()
            for rank, plan in plans.items():
                squares[rank][label, k] += plan.layers[k].sketch(matrix).square().sum()
    return Truth(plans, sums, inner, squares)


def _cosines(gram: Tensor) -> Tensor:
    norm = gram.diagonal().sqrt()
    return gram / (norm[:, None] * norm).clamp_min(torch.finfo(gram.dtype).tiny)


# -------------------------------------------------------------------------------------------------------------- rivals


@dataclass(frozen=True)
class Sketches:
    """A result: sums (P, D) of the classes' sketches, and squares (P, L) of their samples', or None where not made."""

    sums: Tensor
    squares: Tensor | None = None


@dataclass(frozen=True)
class Rival:
    """One way to have it.

    Attributes:
        name: its key in the result file.
        label: its name in the tables.
        run: all of it, on all samples; returns what ``gives`` says.
        gives: ``"sketches"`` (:class:`Sketches` by the plan's matrices), ``"own sketches"`` (by its own), ``"inner"``
            ((N,), inner products with the direction), ``"block"`` (some columns only of (P, D)) or ``"nothing"``.
        plan: the layers served, and the matrices.
        rows: samples timed.
        layers: what they are, for the tables.
        group: of rounds in which it has its turn, one of :data:`GROUPS`.
        sample: None, or the part that is timed instead of ``run``.
        scale: what the sample's time is multiplied by.
        plus: the name of a rival whose time is added then.
        prepared: seconds that went before the first call.
        matrix: for ``"block"``, (all parameters, columns).
    """

    name: str
    label: str
    run: Callable[[], object]
    gives: str
    plan: Plan
    rows: int
    layers: str = "all"
    group: str = "batch"
    sample: Callable[[], object] | None = None
    scale: float = 1.0
    plus: str | None = None
    prepared: float = 0.0
    matrix: Tensor | None = None

    @property
    def timed(self) -> Callable[[], object]:
        """The call that is timed."""
        return self.run if self.sample is None else self.sample


GROUPS = ("batch", "samples", "columns")
"""Groups of ways: on the whole batch, by whole gradients of single samples, and slower ones. Each has its own rounds,
with the baseline among them."""

Way = Callable[[int], object]
"""From a number of samples, the first of the problem's, to a result."""


def by_gradmix(problem: Problem, plan: Plan, layers: Any, seed: int, backend: str) -> Way:
    """The package."""

    def run(rows: int) -> Sketches:
        with problem.precision():
            found = gradmix.class_gradients(
                problem.model,
                (problem.x[:rows], problem.y[:rows]),
                layers=layers,
                rank=plan.rank,
                seed=seed,
                backend=backend,
            )
        return Sketches(found.vectors, found.square_norms)

    return run


def by_gradmix_directions(problem: Problem) -> Way:
    """The package's exact inner products."""

    def run(rows: int) -> Tensor:
        with problem.precision():
            batch = problem.x[:rows], problem.y[:rows]
            return directional_derivatives(problem.model, batch, problem.direction).inner

    return run


def by_hooks(problem: Problem, plan: Plan) -> Way:
    """The same mathematics in plain torch, in hooks of the network's modules.

    Inputs are projected in the forward pass, a convolution's by a convolution of which the filters are the rows of R;
    output gradients by L as soon as the backward pass comes by. A sample's sketch is one product of the two, and is
    added to its class. Parameters ask for no gradients, so none are made.
    """
    model = copy.deepcopy(problem.frozen)
    state: dict[str, Tensor] = {}

    def watch(module: nn.Module, layers: list[tuple[int, Layer]]) -> None:
        def forward(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                seen = _seen(module, layers[0][1], arguments[0])
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(lambda d: backward(seen, d))

        def backward(seen: Tensor, d: Tensor) -> None:
            for number, layer in layers:
                sample = _sample_sketches(module, layer, seen, d)
                labels = state["labels"]
                state["sums"][:, layer.part].index_add_(0, labels, sample.flatten(1))
                state["squares"][:, number].index_add_(0, labels, sample.square().sum((1, 2)))

        module.register_forward_hook(forward)

    owners: dict[str, list[tuple[int, Layer]]] = {}
    for number, layer in enumerate(plan.layers):
        owners.setdefault(layer.parameters[0].rpartition(".")[0], []).append((number, layer))
    for owner, layers in owners.items():
        watch(model.get_submodule(owner), layers)

    def run(rows: int) -> Sketches:
        state["labels"] = problem.y[:rows]
        state["sums"] = problem.x.new_zeros(problem.classes, plan.width)
        state["squares"] = problem.x.new_zeros(problem.classes, len(plan.layers))
        with problem.precision():
            loss = problem.loss(model, rows)
        loss.backward()
        return Sketches(state["sums"], state["squares"])

    return run


def _wide(values: Tensor) -> Tensor:
    """In float32, in which sums are taken, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def _seen(module: nn.Module, layer: Layer, x: Tensor) -> Tensor:
    """Keep of a module's input, in the forward pass, its projection (N, T, columns) or the normalised input."""
    if isinstance(module, nn.BatchNorm2d):
        return F.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, Tokens):
        return x
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    right = torch.eye(layer.shape[1], device=x.device) if layer.right is None else layer.right
    right = right.to(module.weight.dtype)
    weight = right[:, : module.weight[0].numel()]
    bias = right[:, -1] if len(layer.parameters) == 2 else None
    if isinstance(module, nn.Conv2d):
        filters = weight.unflatten(1, module.weight.shape[1:])
        if isinstance(module.padding, str):
            raise NotImplementedError(f"padding {module.padding!r}")
        # Under autocast this is done in its dtype, as the layer itself is.
        return F.conv2d(x, filters, bias, module.stride, module.padding, module.dilation).flatten(2).transpose(1, 2)
    return F.linear(x, weight, bias).reshape(len(x), -1, len(right))


def _sample_sketches(module: nn.Module, layer: Layer, seen: Tensor, d: Tensor) -> Tensor:
    """(N, rows, columns), in float32 or float64."""
    if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        return layer.sketch(_wide(torch.stack(((seen * d).sum((2, 3)), d.sum((2, 3))), 2)))
    if isinstance(module, nn.LayerNorm):
        return layer.sketch(_wide(torch.stack(((seen * d).flatten(1, -2).sum(1), d.flatten(1, -2).sum(1)), 2)))
    if isinstance(module, Tokens):
        return layer.sketch(_wide(d[:, :1] if layer.parameters[0].endswith("token") else d))
    d = d.flatten(2) if isinstance(module, nn.Conv2d) else d.reshape(len(d), -1, d.shape[-1]).transpose(1, 2)
    if layer.left is not None:
        d = layer.left.to(d.dtype) @ d
    return torch.bmm(_wide(d), _wide(seen))


def by_samples(problem: Problem, plan: Plan, gradients: SampleGradients, chunk: int) -> Way:
    """Whole per-sample gradients of ``chunk`` samples at a time, sketched afterwards."""

    def run(rows: int) -> Sketches:
        sums = problem.x.new_zeros(problem.classes, plan.width)
        squares = problem.x.new_zeros(problem.classes, len(plan.layers))
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            with problem.precision():
                found = gradients(problem.x[part], problem.y[part])
            vectors = _wide(plan.project(found))
            sums.index_add_(0, problem.y[part], vectors)
            by_layer = torch.stack([vectors[:, layer.part].square().sum(1) for layer in plan.layers], 1)
            squares.index_add_(0, problem.y[part], by_layer)
        return Sketches(sums, squares)

    return run


def vmap_gradients(model: nn.Module) -> SampleGradients:
    """``torch.func``'s vmap(grad) of the loss of one sample."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None], reduction="sum")

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            found: dict[str, Tensor] = each(parameters, x, y)
        return found

    return gradients


def loop_gradients(model: nn.Module) -> SampleGradients:
    """``torch.autograd.grad``, sample by sample."""
    named = dict(model.named_parameters())

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rows = [
            torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(named.values()))
            for n in range(len(x))
        ]
        return {name: torch.stack(found) for name, found in zip(named, zip(*rows, strict=True), strict=True)}

    return gradients


def by_own_sketches(problem: Problem, plan: Plan, sketches: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Way:
    """A peer's sketches of single samples, each added to its class."""

    def run(rows: int) -> Sketches:
        with problem.precision():
            found = sketches(problem.x[:rows], problem.y[:rows])
        vectors = _wide(torch.cat([found[layer.name] for layer in plan.layers], 1))
        sums = vectors.new_zeros(problem.classes, vectors.shape[1])
        return Sketches(sums.index_add_(0, problem.y[:rows], vectors))

    return run


def by_trak(
    problem: Problem, gradients: SampleGradients, project: Callable[[Tensor], Tensor], chunk: int
) -> tuple[Way, Way]:
    """Two ways: class sums (P, columns) of one block of the projection, and a few samples' projected gradients."""

    def flat(part: slice) -> Tensor:
        with problem.precision():
            return torch.cat([g.flatten(1) for g in gradients(problem.x[part], problem.y[part]).values()], 1)

    def whole(rows: int) -> Tensor:
        sums = torch.zeros(problem.classes, TRAK_COLUMNS, device=problem.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            sums.index_add_(0, problem.y[part], project(flat(part))[:, TRAK_COLUMNS:].float())
        return sums

    kept: list[Tensor] = []

    def timed(rows: int) -> Tensor:
        if not kept:
            kept.append(flat(slice(0, rows)))
        return project(kept[0])

    return whole, timed


def by_jvp(problem: Problem) -> Way:
    """``torch.func.jvp`` of all samples' losses along the direction."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def run(rows: int) -> Tensor:
        def losses(parameters: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(problem.model, parameters, (problem.x[:rows],))
            return F.cross_entropy(logits, problem.y[:rows], reduction="none")

        # The other attentions have no forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), problem.precision():
            tangents: Tensor = torch.func.jvp(losses, (parameters,), (problem.direction,))[1]
        return tangents

    return run


def by_forward_backward(problem: Problem) -> Way:
    """All weight gradients of the batch, as a training step has them."""
    parameters = list(problem.model.parameters())

    def run(rows: int) -> object:
        with problem.precision():
            loss = problem.loss(problem.model, rows)
        return torch.autograd.grad(loss, parameters)

    return run


def by_input_gradients(problem: Problem) -> Way:
    """Forward, and backward to the output of the first layer: no weight gradients."""
    model = copy.deepcopy(problem.frozen)
    first = next(module for module in model.modules() if list(module.parameters(recurse=False)))
    outputs: list[Tensor] = []
    first.register_forward_hook(lambda _, __, output: outputs.append(output.requires_grad_()))

    def run(rows: int) -> object:
        outputs.clear()
        with problem.precision():
            loss = problem.loss(model, rows)
        return torch.autograd.grad(loss, outputs.pop())

    return run


# ------------------------------------------------------------------------------------------------- choosing the rivals


def tried(function: T, *arguments: Any) -> T:
    """The function, after a call: torch.func cannot differentiate everything, and not every backend runs everywhere."""
    try:
        function(*arguments)
    except RuntimeError as error:
        raise Absent(str(error).splitlines()[0]) from error
    return function


class Rivals:
    """The rivals on a problem, and the reasons of those left out.

    Args:
        problem: the problem.
        plans: by rank; the first rank is the one compared, the others are further rows of the package's own.
        seed: of the sketch.
    """

    def __init__(self, problem: Problem, plans: Mapping[int, Plan], seed: int) -> None:
        self.problem, self.plans, self.seed = problem, plans, seed
        self.rank = next(iter(plans))
        self.plan = plans[self.rank]
        self.rivals: list[Rival] = []
        self.absent: dict[str, str] = {}
        self.chunks: dict[str, dict[int, float]] = {}
        self.linear = self._named(nn.Linear)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.problem.y)

    def add(
        self, name: str, label: str, make: Callable[[], Way], gives: str, plan: Plan | None = None, layers: str = "all"
    ) -> None:
        """A rival, made here; if that is refused, its reason."""
        start = time.perf_counter()
        try:
            with self.problem.precision():
                way = make()
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        prepared = time.perf_counter() - start
        rows = self.rows
        self.rivals.append(
            Rival(name, label, lambda: way(rows), gives, plan or self.plan, rows, layers, prepared=prepared)
        )

    def add_bounds(self) -> None:
        """Add the passes that every network needs."""
        p = self.problem
        self.add(BASELINE, "forward + backward", lambda: by_forward_backward(p), "nothing")
        self.add("input_gradients", "forward + input gradients", lambda: by_input_gradients(p), "nothing")

    def add_gradmix(self) -> None:
        """The package: both ranks, each of its backends, and parts of the network."""
        for rank, plan in self.plans.items():
            self._add_gradmix(str(rank), f"k = {rank}", plan)
        for backend in ("torch", "cpp", "cuda"):
            self._add_gradmix(backend, f"k = {self.rank}, backend {backend}", self.plan, backend=backend)
        self._add_gradmix("last", f"k = {self.rank}, last layer", self.plan.only(self.linear[-1:]), "last layer")
        if len(self.linear) > 1:
            self._add_gradmix("linear", f"k = {self.rank}, linear layers", self.plan.only(self.linear), "linear")
        self.add("gradmix_inner", "gradmix, inner products", lambda: by_gradmix_directions(self.problem), "inner")

    def _add_gradmix(self, key: str, text: str, plan: Plan, layers: str = "all", backend: str = "auto") -> None:
        def make() -> Way:
            names = "all" if layers == "all" else list(plan.names)
            run = by_gradmix(self.problem, plan, names, self.seed, backend)
            if backend == "auto":
                return run
            for operator in OPERATORS:
                reasons = dict(operator.explain())
                reason = reasons.get(backend, "it has no such body")
                if reason:
                    raise Absent(f"{operator.name}: {reason}")
            return tried(run, 2)

        self.add(f"gradmix_{key}", f"gradmix, {text}", make, "sketches", plan, layers)

    def add_plain(self) -> None:
        """Plain torch: the same mathematics, and torch.func."""
        p = self.problem
        self.add("hooks", f"plain torch hooks, k = {self.rank}", lambda: by_hooks(p, self.plan), "sketches")
        self.add("jvp", "torch.func.jvp", lambda: tried(by_jvp(p), 2), "inner")
        self.add_samples("vmap_grad", "vmap(grad)", lambda: tried(vmap_gradients(p.model), p.x[:2], p.y[:2]))
        self.add_samples("row_loop", "autograd.grad, sample by sample", lambda: loop_gradients(p.model), chunk=1)

    def add_peers(self) -> None:
        """The peers that are installed."""
        p = self.problem
        self.add_samples("opacus", "opacus", lambda: opacus_gradients(p.model, p.x, p.y), whole=True)
        self.add_samples("backpack", "backpack", lambda: backpack_gradients(p.model, p.x, p.y), whole=True)
        plan = self.plan.only(self.linear)
        self.add(
            "dattri",
            f"dattri LoGra, k = {self.rank}",
            lambda: by_own_sketches(p, plan, dattri_logra(p.model, p.x, p.y, self.rank)),
            "own sketches",
            plan,
            "linear" if len(self.linear) > 1 else "last layer",
        )
        self.add(
            "kronfluence",
            "kronfluence, identity",
            self._kronfluence,
            "inner",
            self.plan.only(self._named(nn.Conv2d, nn.Linear)),
            "conv, linear",
        )
        self.add_trak()

    def _kronfluence(self) -> Way:
        p = self.problem
        products = kronfluence_inner(p.model, p.x, p.y, p.direction)

        def run(rows: int) -> Tensor:
            with p.precision():
                return products(p.x[:rows], p.y[:rows])

        return run

    def _named(self, *kinds: type[nn.Module]) -> list[str]:
        """Names of the network's modules of these kinds."""
        return [name for name, module in self.problem.model.named_modules() if isinstance(module, kinds)]

    def add_samples(
        self,
        name: str,
        label: str,
        make: Callable[[], SampleGradients],
        chunk: int | None = None,
        whole: bool = False,
    ) -> None:
        """Whole per-sample gradients, at the best chunk size, or at the largest that fits if ``whole``."""
        start = time.perf_counter()
        try:
            with self.problem.precision():
                gradients = make()
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        prepared = time.perf_counter() - start
        fitting = self._fitting()
        if chunk is None:
            chunk = fitting if whole else self._best_chunk(name, gradients, fitting)
        chunk, once = self._at_most(gradients, chunk)
        run = by_samples(self.problem, self.plan, gradients, chunk)
        # A multiple of the chunk, and as many as there is time for.
        rows = min(self.rows, chunk * max(1, int(ONE_CALL / once)))
        self.rivals.append(
            Rival(
                name,
                f"{label}, {chunk} samples at a time" if chunk > 1 else label,
                lambda: run(self.rows),
                "sketches",
                self.plan,
                rows,
                group="samples",
                sample=(lambda: run(rows)) if rows < self.rows else None,
                scale=self.rows / rows,
                prepared=prepared,
            )
        )

    def add_trak(self) -> None:
        """TRAK's projection of the gradients that vmap(grad) gives; two blocks of its columns are timed."""
        p = self.problem
        numel = sum(parameter.numel() for parameter in p.model.parameters())
        if not any(rival.name == "vmap_grad" for rival in self.rivals):
            self.absent["trak"] = "it gets its gradients from vmap(grad), which is left out"
            return
        start = time.perf_counter()
        try:
            project, matrix = trak_projector(numel, TRAK_COLUMNS, p.device)
        except Absent as reason:
            self.absent["trak"] = str(reason)
            return
        prepared = time.perf_counter() - start
        chunk = self._fitting()
        whole, sample = by_trak(p, vmap_gradients(p.model), project, chunk)
        blocks = -(-self.plan.width // TRAK_COLUMNS)
        self.rivals.append(
            Rival(
                "trak",
                "vmap(grad), trak BasicProjector",
                lambda: whole(self.rows),
                "block",
                self.plan,
                chunk,
                group="columns",
                sample=lambda: sample(chunk),
                scale=self.rows / chunk * blocks / 2,
                plus="vmap_grad",
                prepared=prepared,
                matrix=matrix,
            )
        )

    def _fitting(self) -> int:
        """Samples whose gradients, and as much again twice, take no more than a third of the memory that is left."""
        numel = sum(parameter.numel() for parameter in self.problem.model.parameters())
        return max(1, min(self.rows, free_memory(self.problem.device) // 3 // (3 * 4 * numel)))

    def _at_most(self, gradients: SampleGradients, chunk: int) -> tuple[int, float]:
        """The chunk, or as much less as memory allows, and its seconds."""
        while True:
            run = partial(by_samples(self.problem, self.plan, gradients, chunk), chunk)
            try:
                return chunk, min(self._seconds(run) for _ in range(3))
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk = -(-chunk // 2)

    def _best_chunk(self, name: str, gradients: SampleGradients, fitting: int) -> int:
        """The chunk with the least time a sample; the search ends where it gets slower, or memory runs out."""
        times: dict[int, float] = {}
        chunk = 1
        while True:
            run = by_samples(self.problem, self.plan, gradients, chunk)
            try:
                taken = min(self._seconds(partial(run, chunk)) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            times[chunk] = taken / chunk
            if times[chunk] > 1.3 * min(times.values()) or chunk == fitting:
                break
            chunk = min(2 * chunk, fitting)
        self.chunks[name] = times
        return min(times, key=lambda chunk: times[chunk])

    def _seconds(self, call: Callable[[], object]) -> float:
        return seconds_of(call, self.problem.device)


# -------------------------------------------------------------------------------------------------------- measurements


Error = dict[str, "dict[str, float] | None"]
"""By kind, None or the median and the largest of the errors found."""


def errors(rival: Rival, truth: Truth) -> Error:
    """The errors of a rival against the loop in float64.

    Returns:
        What can be had of it, the rest None. ``sketch``: by class and layer, the norm of the difference of its class
        sums from L G R^T of the true sums, relative to the norm of these. ``squares``: by class and layer, the relative
        error of the sum of squared norms. ``cosine``: by pair of classes, what the cosine of its sketches is off that
        of the true gradients of the same layers, the sketch's own error included; ``rms`` is the root mean square.
        ``inner``: by sample, the error of the inner product, relative to the largest.
    """
    found: Error = dict.fromkeys(("sketch", "squares", "cosine", "inner"))
    if rival.gives == "nothing":
        return found
    result, plan = rival.run(), rival.plan
    if rival.gives == "inner":
        assert isinstance(result, Tensor)
        kept = [k for k, layer in enumerate(next(iter(truth.plans.values())).layers) if layer.name in plan.names]
        exact = truth.inner[:, kept].sum(1)
        found["inner"] = _spread((result - exact).abs() / exact.abs().max())
        return found
    if rival.gives == "block":
        assert isinstance(result, Tensor) and rival.matrix is not None
        flat = torch.cat([sums.flatten(1) for sums in truth.sums.values()], 1)
        exact = torch.zeros_like(result, dtype=torch.float64)
        for gradients, matrix in zip(flat.split(1 << 20, 1), rival.matrix.split(1 << 20), strict=True):
            exact += gradients @ matrix.double()
        found["sketch"] = _spread(_relative((result - exact).norm(dim=1), exact.norm(dim=1)))
        return found
    assert isinstance(result, Sketches)
    if rival.gives == "sketches":
        by_layer = []
        for layer in plan.layers:
            exact = layer.sketch(layer.matrix(truth.sums)).flatten(1)
            by_layer.append(_relative((result.sums[:, layer.part] - exact).norm(dim=1), exact.norm(dim=1)))
        found["sketch"] = _spread(torch.stack(by_layer))
        if result.squares is not None:
            names = truth.plans[plan.rank].names
            squares = truth.squares[plan.rank][:, [names.index(name) for name in plan.names]]
            found["squares"] = _spread(_relative((result.squares - squares).abs(), squares))
    if len(result.sums) > 1:
        sums = result.sums.double()
        off = ~torch.eye(len(sums), dtype=torch.bool, device=sums.device)
        difference = (_cosines(sums @ sums.T) - truth.cosines(plan.names))[off]
        found["cosine"] = {**_spread(difference.abs()), "rms": float(difference.square().mean().sqrt())}
    return found


def _spread(values: Tensor) -> dict[str, float]:
    """Median and largest; a NaN is the largest."""
    values = values.flatten().double()
    return {"median": float(values.median()), "max": float(values.max())}


def _relative(difference: Tensor, exact: Tensor) -> Tensor:
    """Their quotient, but 0 where both are 0."""
    return torch.where((difference == 0) & (exact == 0), 0.0, difference / exact)


def measure(
    case: Case, device: torch.device, seed: int, repeats: int, warmups: int, seconds: float, peers: bool
) -> dict[str, Any]:
    """Times, memory and errors of every rival."""
    say(f"{case.network}, {case.batch} samples")
    problem = make_problem(case, device, seed)
    ranks = (case.rank, 2 * case.rank)
    plans = {rank: make_plan(problem, rank, seed) for rank in ranks}
    say("the loop in float64")
    truth = find_truth(problem, plans)
    competitors = Rivals(problem, plans, seed)
    competitors.add_bounds()
    competitors.add_gradmix()
    say("looking for the best chunk sizes")
    competitors.add_plain()
    if peers:
        say("peers")
        competitors.add_peers()
    say("errors")
    first: dict[str, float] = {}
    error: dict[str, Error] = {}
    for rival in competitors.rivals:
        if rival.plus not in {None, *error}:
            competitors.absent[rival.name] = f"it comes on top of {rival.plus}, which is left out"
            continue
        try:
            first[rival.name] = seconds_of(rival.timed, device)
            error[rival.name] = errors(rival, truth)
        except torch.OutOfMemoryError:
            competitors.absent[rival.name] = "the device's memory is too small for it"
    kept = [rival for rival in competitors.rivals if rival.name in error]
    del truth
    samples, warmed = _times(kept, device, repeats, warmups, seconds)
    say("memory")
    rows = []
    for rival in kept:
        group = samples[rival.group]
        taken = group[rival.name]
        rows.append(
            {
                "name": rival.name,
                "label": rival.label,
                "gives": rival.gives,
                "layers": rival.layers,
                "layer_names": None if rival.layers == "all" else list(rival.plan.names),
                "rank": rival.plan.rank,
                "rows_timed": rival.rows,
                "extrapolated": rival.sample is not None,
                "samples": len(taken),
                "warmups": warmed[rival.name],
                "seconds": quantiles(taken),
                "over_forward_backward": paired_ratio(taken, group[BASELINE]),
                "peak_memory_bytes": _peak(rival, device),
                "prepare_seconds": rival.prepared,
                "first_call_seconds": first[rival.name],
                "error": error[rival.name],
            }
        )
    plan = plans[case.rank]
    return {
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "layers": len(plan.layers),
        "sketch_entries": {str(rank): plan.width for rank, plan in plans.items()},
        "first_calls_with_two_rows_seconds": list(plan.calls),
        "matrices_seconds": {str(rank): plan.seconds for rank, plan in plans.items()},
        "vmap_grad_seconds_a_row": {str(k): v for k, v in competitors.chunks.get("vmap_grad", {}).items()},
        "left_out": competitors.absent,
        "rows": rows,
    }


def _times(
    rivals: Sequence[Rival], device: torch.device, repeats: int, warmups: int, seconds: float
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Samples by group and name, extrapolated where they are of a part; and calls to warm up by name."""
    samples: dict[str, dict[str, list[float]]] = {}
    warmed: dict[str, int] = {}
    for group in GROUPS:
        own = [rival for rival in rivals if rival.group == group]
        if not own:
            continue
        names = {BASELINE, *(rival.name for rival in own), *(rival.plus for rival in own)}
        taking_part = [rival for rival in rivals if rival.name in names]
        calls = {rival.name: rival.timed for rival in taking_part}
        # The slow ones were called before, to find their chunks and errors.
        most, least, share = {"batch": (warmups, 5, 1.0), "samples": (2, 5, 0.5), "columns": (0, 3, 0.1)}[group]
        say(f"timing {len(calls)} ways, {repeats} rounds or {share * seconds:.0f} s")
        for rival in own:
            warmed[rival.name] = warm_up(rival.timed, device, most) if most else 0
        taken = interleaved(calls, device, repeats=repeats, seconds=share * seconds, least=min(repeats, least))
        samples[group] = {rival.name: [rival.scale * one for one in taken[rival.name]] for rival in taking_part}
        for rival in own:
            if rival.plus is not None:
                pairs = zip(samples[group][rival.name], samples[group][rival.plus], strict=True)
                samples[group][rival.name] = [one + other for one, other in pairs]
    return samples, warmed


def _peak(rival: Rival, device: torch.device) -> int:
    """Peak memory of a rival, with what it is added to and the large matrix it holds."""
    if rival.matrix is None:
        return peak_memory(rival.timed, device)
    return peak_memory(rival.run, device) + rival.matrix.nbytes


# -------------------------------------------------------------------------------------------------------------- report


def show_ratio(ratio: Mapping[str, float]) -> str:
    """The median and, in brackets, the middle of its spread."""
    digits = [
        f"{ratio[level]:.3g}" if ratio[level] < 1000 else f"{ratio[level]:.0f}" for level in ("p50", "p20", "p80")
    ]
    return f"{digits[0]}x ({digits[1]}-{digits[2]})"


def _show(error: Mapping[str, float] | None) -> str:
    return "" if error is None else f"{error['median']:.1e} ({error['max']:.0e})"


def print_report(result: Mapping[str, Any]) -> None:
    """The tables of a result, for a person."""
    case, found = Case(**result["case"]), result["gradients"]
    rows = found["rows"]
    print()
    print(machine_line(result["machine"]))
    norm = {"batch": " with BatchNorm in evaluation mode", "group": " with GroupNorm"}[case.norm]
    side, device = NETWORKS[case.network].image, result["arguments"]["device"]
    where = f"{'float32' if case.dtype == 'float32' else f'autocast to {case.dtype}'} on {device}"
    if device.startswith("cuda"):
        where += f", TF32 {'on' if result['arguments']['tf32'] else 'off'}"
    print(
        f"{case.network}{norm * case.network.startswith('resnet')}, {found['parameters']:,} parameters in "
        f"{found['layers']} layers; N = {case.batch} samples of {side} x {side} in {min(case.classes, case.batch)} "
        f"classes; k = {case.rank}; {where}\n"
    )
    timed = sorted({row["rows_timed"] for row in rows if row["extrapolated"] and row["gives"] != "block"})
    new, known = map(show_time, found["first_calls_with_two_rows_seconds"])
    show_table(
        "Class sketches or inner products of one batch",
        ["", "layers", "p20", "p50", "p80", "of forward + backward (20-80 %)", "peak memory", "first call"],
        [
            [
                row["label"] + (" *" if row["extrapolated"] else ""),
                row["layers"],
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                show_ratio(row["over_forward_backward"]),
                show_bytes(row["peak_memory_bytes"]),
                show_time(row["first_call_seconds"] + row["prepare_seconds"]),
            ]
            for row in rows
        ],
        [
            *(
                [f"* extrapolated: from {' or '.join(map(str, timed))} of {case.batch} samples; memory of that sample"]
                if timed
                else []
            ),
            *(
                [f"* trak: extrapolated from 2 of its blocks of {TRAK_COLUMNS} columns; memory with one of them"]
                if any(row["gives"] == "block" for row in rows)
                else []
            ),
            f"{rows[0]['samples']} rounds, {min(row['samples'] for row in rows)} for whole per-sample gradients; "
            "ratios are of samples of the same round",
            "first call: once, with what went before it (hooks, compilation, the peers' random matrices)",
            f"two samples by the package: {new} with a network new to it, {known} with one that it knows",
            "the matrices of all layers take "
            + ", ".join(f"{show_time(v)} at k = {k}" for k, v in found["matrices_seconds"].items())
            + ": made in a sketch's first call, and before the timing",
            *(f"{name} left out: {reason}" for name, reason in found["left_out"].items()),
        ],
    )
    show_table(
        "Error against a loop over single samples in float64: median (largest)",
        ["", "sketch", "squared norms", "cosines of classes", "inner products"],
        [
            [
                row["label"],
                _show(row["error"]["sketch"]),
                _show(row["error"]["squares"]),
                "" if row["error"]["cosine"] is None else f"{row['error']['cosine']['rms']:.4f}",
                _show(row["error"]["inner"]),
            ]
            for row in rows
            if row["gives"] != "nothing"
        ],
        [
            "sketch: |S - L G R^T| / |L G R^T| of a class and layer, with the loop's G; inner products: of the largest",
            f"cosines: RMS difference from those of the unsketched gradients; 1/k = {1 / case.rank:.4f}",
            "a largest error far above the median: a ReLU whose input is above 0 in one precision and below in another",
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="a common case (default: resnet18)", default=argparse.SUPPRESS
    )
    parser.add_argument("--network", choices=list(NETWORKS), help="the network", default=argparse.SUPPRESS)
    parser.add_argument("--norm", choices=NORMS, help="what a ResNet normalises by", default=argparse.SUPPRESS)
    parser.add_argument("--batch", type=count, help="rows", default=argparse.SUPPRESS)
    parser.add_argument("--classes", type=count, help="classes among the samples", default=argparse.SUPPRESS)
    parser.add_argument("--rank", type=count, help="rows of the sketch's matrices", default=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the forward pass, by autocast",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network unless named, few repeats: a look, not a measurement"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    parser.add_argument("--tf32", action="store_true", help="let float32 products on a GPU use TF32")
    add_run_arguments(
        parser,
        quick_repeats=3,
        seconds=60.0,
        stop="stop the rounds then, though not before 5; less for slow ways",
        seed="of weights, samples and sketch",
    )
    options = parser.parse_args(arguments)
    base = PRESETS[options.preset] if "preset" in options else QUICK if options.quick else PRESETS["resnet18"]
    names = ("network", "norm", "batch", "classes", "rank", "dtype")
    options.case = replace(base, **{name: getattr(options, name) for name in names if name in options})
    if options.case.classes > NETWORKS[options.case.network].classes:
        parser.error(
            f"argument --classes: got {options.case.classes}, expected at most the "
            f"{NETWORKS[options.case.network].classes} of {options.case.network}"
        )
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    # The peers warn of their own doings, in every call.
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        "benchmark": "gradient_engine",
        "machine": {**prepare_machine(device), "peers": versions()},
        "arguments": {
            **run_values(options),
            "preset": getattr(options, "preset", None),
            "tf32": options.tf32,
            "peers": not options.no_peers,
        },
        "case": vars(options.case),
        "gradients": measure(
            options.case,
            device,
            options.seed,
            options.repeats,
            2 if options.quick else 10,
            options.seconds,
            not options.no_peers,
        ),
    }
    result["machine"]["load_at_end"] = load_average()
    print_report(result)
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
