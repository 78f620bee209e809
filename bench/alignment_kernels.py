"""Times the bodies of the alignment operators against plain torch, beside the least time this machine could take.

Every body of an operator gets the same inputs in the same run; its error is against float64. See bench/README.md for
the rules.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from _measure import (
    add_run_arguments,
    begin,
    check_run,
    finish,
    interleaved,
    load_average,
    machine_line,
    paired_ratio,
    prepare_machine,
    quantiles,
    run_values,
    say,
    show_table,
    show_time,
    warm_up,
    write_json,
)
from _rates import PRECISIONS, Product, Rates, measure_rates
from _selection_problem import LAM, Problem, Sizes, make_problem
from _selection_rivals import INTERPRETED, by_plain_torch
from torch import Tensor

from gradmix.mixing_weight import beta_quadrature
from gradmix.ops import _triton, cosine_alignment, draw_partners, last_layer_gradient, mixed_alignment
from gradmix.ops.backends import Operator

Tensors = tuple[Tensor, ...]

BAND = 1e-6
"""A decision counts where the inner product exceeds this share of the largest."""

COLD = 64 << 20
"""Bytes of inputs that are gone through in turn on a GPU, so that no call finds its own in the cache."""

NODES = 4
"""Mixing weights of a class table: a quadrature over Beta(1, 1)."""

MOST_SETS = 8
"""Sets of inputs at the most."""


@dataclass(frozen=True)
class Way:
    """One way to do a task.

    Attributes:
        name: in the result; the bar is the first of a task's ways.
        label: in the table.
        run: from the inputs to the results.
        precision: of its products, for the rate that it could reach.
        finish: what makes its results comparable with the truth, outside of the time taken.
    """

    name: str
    label: str
    run: Callable[[Tensors], Tensors]
    precision: str = "ieee"
    finish: Callable[[Tensors, Tensors], Tensors] = lambda _inputs, results: results


@dataclass(frozen=True)
class Task:
    """Work for an operator at one size.

    Attributes:
        operator: its name.
        sizes: by letter.
        flops: of the matrix products that the work needs at least.
        make: from a seed to inputs on the CPU.
        ways: the ways to do it.
        truth: the results from inputs in float64.
        refused: by name, the bodies that cannot run, with the reason.
        signed: whether the first result's sign is a decision.
    """

    operator: str
    sizes: dict[str, int]
    flops: int
    make: Callable[[int], Tensors]
    ways: list[Way]
    truth: Callable[[Tensors], Tensors]
    refused: dict[str, str] = field(default_factory=dict)
    signed: bool = False

    @property
    def title(self) -> str:
        """The operator and its sizes."""
        return f"{self.operator}, {', '.join(f'{name} = {value}' for name, value in self.sizes.items())}"


# ---------------------------------------------------------------------------------------------------------------- ways


def ways_of(
    operator: Operator,
    arguments: Callable[[Tensors, str], tuple[Any, ...]],
    example: Tensors,
    *,
    products: bool = True,
    call: Callable[[Callable[..., Any], tuple[Any, ...]], Tensors] = lambda run, given: _as_tuple(run(*given)),
) -> tuple[list[Way], dict[str, str]]:
    """The bodies of an operator that can run these inputs, torch first, and why the others cannot.

    Args:
        operator: whose bodies.
        arguments: from the inputs and a precision to a body's arguments.
        example: inputs on the device.
        products: whether its precision can be chosen.
        call: how a body is called.
    """
    found: dict[str, list[Way]] = {}
    refused: dict[str, str] = {}
    for body in operator.backends:
        if body.name == "reference":
            continue
        reason = body.available() or body.can_run(*arguments(example, "ieee"))
        if reason:
            refused[body.name] = reason
            continue

        def run(inputs: Tensors, precision: str, body: Callable[..., Any] = body.run) -> Tensors:
            return call(body, arguments(inputs, precision))

        if body.name == "torch":
            found["torch"] = torch_ways("torch", "gradmix, torch", partial(run, precision="ieee"), example, products)
            continue
        chosen = products and body.name == "triton"
        precisions = PRECISIONS if chosen else ("ieee",)
        found[body.name] = [
            Way(
                f"{body.name}_{precision}" if chosen else body.name,
                f"gradmix, {body.name}{f', {precision}' if chosen else ''}",
                partial(run, precision=precision),
                precision,
            )
            for precision in precisions
        ]
    return found.pop("torch") + [way for ways in found.values() for way in ways], refused


def torch_ways(
    name: str, label: str, run: Callable[[Tensors], Tensors], example: Tensors, products: bool = True
) -> list[Way]:
    """Torch calls with float32 products in full and, on a GPU, in TF32."""
    ways = [Way(name, label, partial(_with_tf32, run, False))]
    if products and example[0].is_cuda:
        ways.append(Way(f"{name}_tf32", f"{label}, TF32 allowed", partial(_with_tf32, run, True), "tf32"))
    return ways


def _with_tf32(run: Callable[[Tensors], Tensors], allowed: bool, inputs: Tensors) -> Tensors:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        return run(inputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _as_tuple(results: Any) -> Tensors:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def on(device: torch.device, inputs: Tensors) -> Tensors:
    return tuple(value.to(device) for value in inputs)


def _doubled(inputs: Tensors) -> Tensors:
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


# --------------------------------------------------------------------------------------------------------------- tasks


def _rows(sizes: Sizes, seed: int) -> Tensors:
    """Features, logits, labels, reference, and the mixing weight (1,)."""
    p = make_problem(sizes, seed)
    return p.features_a, p.logits_a, p.labels_a, p.reference, torch.tensor([LAM], dtype=torch.float64)


def _plain(inputs: Tensors) -> Tensors:
    """Plain torch; the weight is a number, as one writes it."""
    h, z, y, reference, _ = inputs
    nothing = reference.new_empty(0)
    inner, angle = by_plain_torch(Problem(h, z, y, h, z, y, nothing, nothing, reference, LAM))
    assert angle is not None
    return inner, angle


def _inner_and_cosine(inputs: Tensors, results: Tensors) -> Tensors:
    inner, norm = (value.squeeze(0) for value in results)
    return inner, mixed_alignment.cosine(inner, norm, inputs[3].norm())


def mixed_alignment_task(n: int, classes: int, width: int, device: torch.device) -> Task:
    """All pairs of n samples with each other."""
    sizes = Sizes(n, n, classes, width, own_rows=True)
    make = partial(_rows, sizes)

    def arguments(inputs: Tensors, precision: str) -> tuple[Any, ...]:
        h, z, y, reference, lams = inputs
        return h, z, y, h, z, y, reference, lams, True, precision

    example = on(device, make(0))
    ways, refused = ways_of(mixed_alignment.OPERATOR, arguments, example)
    ways = [replace(way, finish=_inner_and_cosine) for way in ways]
    if "triton" not in refused:
        # What a step pays where U is at hand; also what two launches take.
        kernel: Any = importlib.import_module("gradmix.kernels.mixed_alignment")

        def alone(inputs: Tensors, precision: str) -> Tensors:
            h, z, y, _, lams, u = inputs
            return _as_tuple(kernel.mixed_alignment(h, z, y, u, h, z, y, u, lams, bias=True, precision=precision))

        ways += [
            Way(f"kernel_{p}", f"kernel alone, U given, {p}", partial(alone, precision=p), p, _inner_and_cosine)
            for p in PRECISIONS
        ]

    def truth(inputs: Tensors) -> Tensors:
        side, (reference, lams) = mixed_alignment.Side(*inputs[:3]), inputs[3:5]
        exact = mixed_alignment.mixed_alignment(side, side, reference, lams, backend="torch")
        return _inner_and_cosine(inputs, tuple(exact))

    def with_u(seed: int) -> Tensors:
        inputs = make(seed)
        return *inputs, torch.addmm(inputs[3][:, -1], inputs[0], inputs[3][:, :-1].T)

    def without_u(way: Way) -> Way:
        return way if way.name.startswith("kernel") else replace(way, run=lambda inputs: way.run(inputs[:5]))

    plain = torch_ways("plain", "plain torch", _plain, example)
    ways = [without_u(way) for way in [*plain, *ways]]
    named = {"N = M": n, "C": classes, "d": width}
    return Task("mixed_alignment", named, sizes.flops, with_u, ways, truth, refused, signed=True)


def class_table_task(classes: int, group: int, width: int, device: torch.device) -> Task:
    """Sums over the pairs of samples of all pairs of classes, ``group`` samples each, at several mixing weights."""
    slots = classes * group
    lams = torch.tensor(beta_quadrature(1.0, NODES)[0], dtype=torch.float64)
    sizes = Sizes(slots, slots, classes, width, own_rows=True)

    def make(seed: int) -> Tensors:
        h, z, y, reference, _ = _rows(sizes, seed)
        order = torch.argsort(y, stable=True)  # the groups are of samples alike, as a table has them
        return h[order], z[order], y[order], reference, lams

    def summed(results: Sequence[Tensor]) -> Tensors:
        sums = []
        for pairs in results:
            pairs = pairs.clone() if group == 1 else pairs
            pairs.diagonal(dim1=1, dim2=2).zero_()  # a sample is not mixed with itself
            sums.append(pairs.view(len(pairs), classes, group, classes, group).sum((2, 4)))
        return tuple(sums)

    def by_torch(inputs: Tensors) -> Tensors:
        h, z, y, reference, weights = inputs
        side = mixed_alignment.Side(h, z, y)
        return summed(mixed_alignment.mixed_alignment_torch(side, side, reference, weights))

    example = on(device, make(0))
    ways = torch_ways("torch", "gradmix, torch, then sums", by_torch, example)
    probe = (*example[:3], *example[:3], *example[3:], "ieee")
    body = next(body for body in mixed_alignment.OPERATOR.backends if body.name == "triton")
    reason = body.available() or body.can_run(*probe)
    if reason is None:
        kernel: Any = importlib.import_module("gradmix.kernels.mixed_alignment")

        rows = torch.arange(slots, device=device)

        def by_kernel(inputs: Tensors, precision: str) -> Tensors:
            h, z, y, reference, weights = inputs
            u = torch.addmm(reference[:, -1], h, reference[:, :-1].T)
            sums = kernel.class_pair_sums(h, z, y, u, weights, rows, group, bias=True, precision=precision)
            return _as_tuple(sums)

        ways += [Way(f"triton_{p}", f"U, then one kernel, {p}", partial(by_kernel, precision=p), p) for p in PRECISIONS]
    flops = 2 * slots * classes * (width + 1) + 2 * slots * slots * width + len(lams) * 8 * slots * slots * classes
    named = {"classes": classes, "samples a class": group, "weights": len(lams), "d": width}
    refused = {} if reason is None else {"triton": reason}
    return Task("class_pair_sums", named, flops, make, ways, by_torch, refused, signed=True)


def cosine_task(layers: int, rows: int, width: int, device: torch.device) -> Task:
    """Cosines of all pairs of sketches, layer by layer."""

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(layers, rows, width, generator=generator),)

    def arguments(inputs: Tensors, precision: str) -> tuple[Any, ...]:
        return inputs[0], inputs[0], precision

    ways, refused = ways_of(cosine_alignment.OPERATOR, arguments, on(device, make(0)))
    flops = 2 * layers * rows * rows * width
    plain = torch_ways("plain", "plain torch", _plain_cosines, on(device, make(0)))
    return Task(
        "cosine_alignment",
        {"L": layers, "P = Q": rows, "K": width},
        flops,
        make,
        plain + ways,
        lambda inputs: (cosine_alignment.cosine_alignment_torch(inputs[0], inputs[0]),),
        refused,
    )


def _plain_cosines(inputs: Tensors) -> Tensors:
    unit = torch.nn.functional.normalize(inputs[0], dim=2)
    return (torch.bmm(unit, unit.transpose(1, 2)),)


def mixed_gram_task(layers: int, rows: int, width: int, device: torch.device) -> Task:
    """Alignment of all mixed pairs of sketches with a reference, layer by layer."""

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(layers, rows, width, generator=generator)
        return x, torch.randn(layers, width, generator=generator), torch.tensor([LAM], dtype=torch.float64)

    def arguments(inputs: Tensors, precision: str) -> tuple[Any, ...]:
        x, reference, lam = inputs
        return x, x, reference, lam, precision

    ways, refused = ways_of(cosine_alignment.MIXED_OPERATOR, arguments, on(device, make(0)))
    return Task(
        "mixed_gram_alignment",
        {"L": layers, "P = Q": rows, "K": width},
        2 * layers * rows * rows * width,
        make,
        ways,
        lambda inputs: tuple(cosine_alignment.mixed_gram_alignment_torch(*arguments(inputs, "ieee"))),
        refused,
        signed=True,
    )


def gradient_task(rows: int, classes: int, width: int, device: torch.device) -> Task:
    """The sum of last-layer gradients of a chunk of the buffer."""
    sizes = Sizes(rows, 1, classes, width)

    def make(seed: int) -> Tensors:
        p = make_problem(sizes, seed)
        return p.features_a, p.logits_a, p.labels_a

    def arguments(inputs: Tensors, precision: str) -> tuple[Any, ...]:
        h, z, y = inputs
        return torch.zeros(classes, width + 1, dtype=h.dtype, device=h.device), h, z, y, precision

    def call(run: Callable[..., Any], given: tuple[Any, ...]) -> Tensors:
        run(*given)
        return (given[0],)

    def plain(inputs: Tensors) -> Tensors:
        h, z, y = inputs
        residual = torch.softmax(z, 1)
        residual.scatter_add_(1, y[:, None], residual.new_full((len(y), 1), -1.0))
        return (torch.cat([residual.T @ h, residual.sum(0)[:, None]], 1),)

    example = on(device, make(0))
    ways, refused = ways_of(last_layer_gradient.OPERATOR, arguments, example, call=call)
    return Task(
        "last_layer_gradient",
        {"N": rows, "C": classes, "d": width},
        2 * rows * classes * width,
        make,
        torch_ways("plain", "plain torch", plain, example) + ways,
        lambda inputs: call(last_layer_gradient.last_layer_gradient_torch, arguments(inputs, "ieee")),
        refused,
    )


def draw_task(rows: int, partners: int, policy: str, device: torch.device) -> Task:
    """A partner for each sample; no products, results equal to the last bit."""
    own_rows = rows == partners

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        score = torch.randn(rows, partners, generator=generator)
        drawn = torch.rand(rows, dtype=torch.float64, generator=generator)
        return score >= 0, drawn, score

    def arguments(inputs: Tensors, _precision: str) -> tuple[Any, ...]:
        allowed, drawn, score = inputs
        return allowed, drawn, score if policy == "best" else None, partners, policy, own_rows

    ways, refused = ways_of(draw_partners.OPERATOR, arguments, on(device, make(0)), products=False)

    def truth(inputs: Tensors) -> Tensors:
        return _as_tuple(draw_partners.draw_partners_reference(*arguments(inputs, "ieee")))

    return Task(f"draw_partners, {policy}", {"N": rows, "M": partners}, 0, make, ways, truth, refused)


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """All tasks, one at a time, since their inputs take memory."""
    for n, classes, width in [(9, 7, 5), (33, 40, 20)] if quick else [
        (256, 1000, 2048), (512, 1000, 2048), (256, 1000, 768), (256, 100, 512), (256, 21_841, 768),
    ]:  # fmt: skip
        yield mixed_alignment_task(n, classes, width, device)
    for classes, group, width in [(7, 2, 5)] if quick else [(1000, 1, 2048), (1000, 2, 2048), (100, 16, 512)]:
        yield class_table_task(classes, group, width, device)
    for layers, rows, width in [(2, 9, 33)] if quick else [(1, 100, 256), (21, 100, 256), (21, 256, 1024)]:
        yield cosine_task(layers, rows, width, device)
        yield mixed_gram_task(layers, rows, width, device)
    for rows, classes, width in [(17, 7, 5)] if quick else [(512, 1000, 2048), (512, 100, 512), (512, 21_841, 768)]:
        yield gradient_task(rows, classes, width, device)
    for rows, partners in [(9, 9), (5, 70)] if quick else [(512, 512), (256, 20_000)]:
        for policy in ("uniform", "best"):
            yield draw_task(rows, partners, policy, device)


# ------------------------------------------------------------------------------------------------------------- measure


def measure(task: Task, device: torch.device, rates: Rates, repeats: int, seconds: float, seed: int) -> dict[str, Any]:
    """The figures of a task."""
    first = task.make(seed)
    inputs = on(device, first)
    bytes_of_one = sum(value.numel() * value.element_size() for value in first)
    number = min(MOST_SETS, 1 + COLD // bytes_of_one) if device.type == "cuda" else 1
    sets = [inputs] + [on(device, task.make(seed + k)) for k in range(1, number)]
    # In float64 a GPU is quicker too.
    exact = on(device, _doubled(first)) if device.type == "cuda" else _doubled(first)
    truth = on(torch.device("cpu"), task.truth(exact))
    refused = dict(task.refused)
    ways = task.ways
    if _triton.is_interpreted():
        for way in ways:
            if "triton" in way.name or "kernel" in way.name:
                refused[way.name] = INTERPRETED
        ways = [way for way in ways if way.name not in refused]
    calls: dict[str, Callable[[], object]] = {way.name: partial(each, way.run, sets) for way in ways}
    eager = dict(calls)
    errors, launches, queued = {}, {}, {}
    for way in ways:
        results = way.run(inputs)
        errors[way.name] = deviation(way.finish(inputs, results), truth, task.signed)
        warm_up(calls[way.name], device, 5)
        if device.type == "cuda":
            launches[way.name] = _launches(partial(way.run, inputs))
            graph = captured(way.run, sets)
            queued[way.name] = graph if isinstance(graph, str) else None
            if not isinstance(graph, str):
                calls[way.name] = graph
    samples = interleaved(calls, device, repeats=repeats, seconds=seconds, least=5)
    samples = {name: [sample / number for sample in taken] for name, taken in samples.items()}
    whole = samples
    if device.type == "cuda":
        whole = interleaved(eager, device, repeats=repeats, seconds=seconds / 2, least=5)
        whole = {name: [sample / number for sample in taken] for name, taken in whole.items()}
    least_bytes = bytes_of_one + sum(value.numel() * value.element_size() for value in ways[0].run(inputs))
    bar = ways[0].name
    rows = []
    for way in ways:
        floor = rates.attainable_seconds(task.flops, least_bytes, way.precision)
        taken = quantiles(samples[way.name])
        rows.append(
            {
                "name": way.name,
                "label": way.label,
                "precision": way.precision,
                "samples": len(samples[way.name]),
                "seconds": taken,
                "call_seconds": quantiles(whole[way.name]),
                "bar_over_this": paired_ratio(samples[bar], samples[way.name]),
                "attainable_seconds": floor,
                "share_of_attainable": floor / taken["p50"],
                "launches": launches.get(way.name),
                "notcaptured": queued.get(way.name),
                "error": errors[way.name],
            }
        )
    return {
        "operator": task.operator,
        "sizes": task.sizes,
        "title": task.title,
        "flops": task.flops,
        "least_bytes": least_bytes,
        "input_sets": number,
        "bar": bar,
        "rows": rows,
        "refused": refused,
    }


def deviation(found: Tensors, truth: Tensors, signed: bool) -> dict[str, Any]:
    """The largest error relative to the largest entry, of each result; and the share of equal decisions.

    Whole numbers and truth values are decisions, all of which count; of a signed result its sign, where the true value
    exceeds :data:`BAND` of the largest.
    """
    errors: list[float] = []
    equal: list[float] = []
    for value, exact in zip(found, truth, strict=True):
        value = value.cpu()
        if not exact.is_floating_point():
            equal.append(float((value == exact).double().mean()))
            continue
        largest = float(exact.abs().max())
        errors.append(float((value.double() - exact).abs().max()) / (largest or 1.0))
    if signed:
        value, exact = found[0].cpu(), truth[0]
        counted = exact.abs() > BAND * exact.abs().max()
        equal.append(float(((value >= 0) == (exact >= 0))[counted].double().mean()))
    return {"largest": errors, "decisions_agree": min(equal) if equal else None}


def each(run: Callable[[Tensors], Tensors], sets: Sequence[Tensors]) -> None:
    for inputs in sets:
        run(inputs)


def captured(run: Callable[[Tensors], Tensors], sets: Sequence[Tensors]) -> Callable[[], object] | str:
    """A replay of the calls of all sets as one CUDA graph, or why there is none. The caller has warmed up."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [run(inputs) for inputs in sets]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0]

    def replay(_kept: object = kept) -> None:
        graph.replay()

    replay()
    return replay


def _launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills of one call on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ())


# -------------------------------------------------------------------------------------------------------------- report


def show_task(found: dict[str, Any], cuda: bool) -> None:
    """The table of a task, for a person."""
    rows = found["rows"]
    bar = rows[0]
    show_table(
        found["title"],
        [
            "",
            "p20",
            "p50",
            "p80",
            "bar / this (20-80 %)",
            "of attainable",
            "with host",
            "launches",
            "error",
            "decisions",
        ],
        [
            [
                row["label"] + (" *" if row["notcaptured"] else ""),
                *(show_time(row["seconds"][level]) for level in ("p20", "p50", "p80")),
                "{p50:.2f} ({p20:.2f}-{p80:.2f})".format(**row["bar_over_this"]),
                f"{row['share_of_attainable']:.0%}",
                show_time(row["call_seconds"]["p50"]) if cuda else "",
                "" if row["launches"] is None else str(row["launches"]),
                " / ".join(f"{error:.0e}" for error in row["error"]["largest"]),
                "" if row["error"]["decisions_agree"] is None else f"{row['error']['decisions_agree']:.2%}",
            ]
            for row in rows
        ],
        [
            f"the bar: {bar['label']}; attainable: {show_time(bar['attainable_seconds'])} for "
            f"{found['flops'] / 1e9:.3g} Gflop and {found['least_bytes'] / 1e6:.3g} MB at the bar's precision",
            *([f"{found['input_sets']} sets of inputs in turn"] if cuda else []),
            *(f"* timed without a graph, {row['label']}: {row['notcaptured']}" for row in rows if row["notcaptured"]),
            *(f"{name} left out: {reason}" for name, reason in found["refused"].items()),
        ],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", help="tasks in whose title this occurs", default="")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats: a look, not a measurement")
    add_run_arguments(
        parser,
        quick_repeats=3,
        seconds=4.0,
        stop="stop a task's rounds then, though not before 5",
        seed="of the inputs",
    )
    options = parser.parse_args(arguments)
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 2 if no task has such a title."""
    options = parse(arguments)
    device = begin(options)
    described = prepare_machine(device)
    print(machine_line(described) + "\n")
    product = Product.on(device, options.quick)
    rates = measure_rates(product, device, options.quick)
    result: dict[str, Any] = {
        "benchmark": "alignment_kernels",
        "machine": described,
        "arguments": {
            **run_values(options),
            "only": options.only,
        },
        "rates": {**rates.as_figures(), "product": str(product)},
        "tasks": [],
    }
    for task in tasks(device, options.quick):
        if options.only not in task.title:
            continue
        say(task.title)
        found = measure(task, device, rates, options.repeats, options.seconds, options.seed)
        show_task(found, device.type == "cuda")
        result["tasks"].append(found)
        described["load_at_end"] = load_average()
        if "json" in options:  # after each task, so that a run cut short is not lost
            write_json(options.json, result)
    if not result["tasks"]:
        print(f"argument --only: no task's title holds {options.only!r}", file=sys.stderr)
        return 2
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
