"""Times the ways to exact gradients, of classes and of single samples, by network, classes and samples.

Sketches are faster than any of them (``gradient_engine.py``). Whole gradients can also be had by a pass for each class,
by ``vmap(grad)`` or by a loop: which way is fastest where? See bench/README.md for the rules.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _measure import (
    Call,
    add_run_arguments,
    begin,
    check_run,
    count,
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
from _networks import NETWORKS, make_network
from torch import Tensor

import gradmix

SIZES = ("perceptron", "resnet-tiny", "vit-tiny")
QUICK = ("perceptron",)
LEAST = 5
"""Rounds made in any case."""
AGREEMENT = 1e-8
"""Largest difference in float64 of the ways' results from the pass for each class and the loop, of the largest entry.

In float32 a ReLU whose input is next to zero is on in one way and off in another.
"""
COMPARED = 12
"""Samples of which the results are compared."""


class Case(NamedTuple):
    """A network, a number of samples, and how many classes occur among them."""

    network: str
    samples: int
    classes: int


class Way(NamedTuple):
    """One way; its result is (classes or samples, all parameters of the model, flattened one after the other)."""

    name: str
    label: str
    gives: str
    run: Call
    whole: Call


class Problem:
    """A network and samples of ``case.classes`` classes, as many of each as can be."""

    def __init__(self, case: Case, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> None:
        network = NETWORKS[case.network]
        self.model = make_network(case.network, seed=seed).to(device, dtype)
        generator = torch.Generator().manual_seed(seed)
        shape = (case.samples, 3, network.image, network.image)
        self.x = torch.randn(shape, generator=generator).to(device, dtype)
        self.y = (torch.arange(case.samples) % case.classes).to(device)
        self.parameters = dict(self.model.named_parameters())

    def gradient(self, part: Tensor) -> tuple[Tensor, ...]:
        """The summed gradient of some samples."""
        loss = F.cross_entropy(self.model(self.x[part]), self.y[part], reduction="sum")
        return torch.autograd.grad(loss, list(self.parameters.values()))

    def step(self) -> object:
        """A forward and a backward pass of all samples."""
        return self.gradient(torch.arange(len(self.y)))

    def pass_a_class(self) -> list[tuple[Tensor, ...]]:
        """A forward and a backward pass for each class, of its samples."""
        return [self.gradient((self.y == label).nonzero()[:, 0]) for label in self.y.unique()]

    def loop(self) -> list[tuple[Tensor, ...]]:
        """A forward and a backward pass for each sample."""
        return [self.gradient(torch.tensor([n])) for n in range(len(self.y))]

    def by_vmap(self) -> dict[str, Tensor]:
        """``torch.func``'s vmap(grad), all samples at once."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.model, parameters, (x[None],)), y[None])

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        result: dict[str, Tensor] = each({n: p.detach() for n, p in self.parameters.items()}, self.x, self.y)
        return result

    def ways(self) -> list[Way]:
        """All ways, the rivals' first."""
        batch = (self.x, self.y)
        classes = partial(gradmix.class_gradients, self.model, batch, sketch="identity")
        sums = partial(classes, norms=False)
        samples = partial(gradmix.sample_gradients, self.model, batch, sketch="identity")
        return [
            Way(
                "pass_a_class",
                "a pass a class",
                "classes",
                self.pass_a_class,
                lambda: _rows(self.pass_a_class()),
            ),
            Way("class", "gradmix", "classes", classes, lambda: self._of_engine(classes())),
            Way("class_sum", "gradmix, norms=False", "classes", sums, lambda: self._of_engine(sums())),
            Way("loop", "a pass a sample", "samples", self.loop, lambda: _rows(self.loop())),
            Way("vmap_grad", "vmap(grad)", "samples", self.by_vmap, lambda: _flat(list(self.by_vmap().values()))),
            Way("sample", "gradmix", "samples", samples, lambda: self._of_engine(samples())),
        ]

    def _of_engine(self, result: Any) -> Tensor:
        """The engine's gradients, parameter by parameter."""
        found: dict[str, Tensor] = {}
        for layer in result.layout:
            block, at = result.layer(layer.name), 0
            for name in layer.parameters:
                like = self.parameters[name]
                width = like.numel() // block.shape[1]
                found[name] = block[:, :, at : at + width].reshape(len(block), *like.shape)
                at += width
        return _flat([found[name] for name in self.parameters])


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1)


def _rows(gradients: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients])


def check_agreement(ways: list[Way]) -> dict[str, float]:
    """The largest difference of each way from the plain one that gives the same, of the largest entry.

    Raises:
        RuntimeError: it is not small.
    """
    plain = {way.gives: way.whole() for way in ways if way.name in ("pass_a_class", "loop")}
    found = {}
    for way in ways:
        truth: Any = plain[way.gives]
        difference = float((way.whole() - truth).abs().max() / truth.abs().max())
        if not difference <= AGREEMENT:
            raise RuntimeError(f"{way.label}: differs by {difference:.1e} of the largest entry, expected {AGREEMENT:g}")
        found[way.name] = difference
    return found


def measure(case: Case, device: torch.device, seed: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Times of all ways over a forward and backward pass of the same round."""
    few = case._replace(samples=min(case.samples, COMPARED))
    differences = check_agreement(Problem(few, device, seed, torch.float64).ways())
    problem = Problem(case, device, seed)
    ways = problem.ways()
    calls: dict[str, Call] = {"step": problem.step, **{way.name: way.run for way in ways}}
    for call in calls.values():
        warm_up(call, device, 3)
    taken = interleaved(calls, device, repeats=repeats, seconds=seconds, least=LEAST)
    return {
        **case._asdict(),
        "rounds": len(taken["step"]),
        "step_seconds": quantiles(taken["step"]),
        "over_step": {way.name: paired_ratio(taken[way.name], taken["step"]) for way in ways},
        "difference": differences,
    }


def print_report(result: dict[str, Any]) -> None:
    """The tables, for a person; the fastest way is marked."""
    print(machine_line(result["machine"]) + "\n")
    for gives, title in (("classes", "Sums by class"), ("samples", "Gradients of single samples")):
        labels = {way: label for way, (label, given) in result["ways"].items() if given == gives}
        rows = []
        for found in result["cases"]:
            ratios = {way: found["over_step"][way] for way in labels}
            best = min(ratios, key=lambda way: float(ratios[way]["p50"]))
            rows.append(
                [
                    f"{found['network']}, {found['samples']} of {found['classes']} classes",
                    show_time(found["step_seconds"]["p50"]),
                    *(
                        f"{ratio['p50']:.2g} ({ratio['p20']:.2g}-{ratio['p80']:.2g})" + ("*" if way == best else " ")
                        for way, ratio in ratios.items()
                    ),
                ]
            )
        show_table(
            f"{title}, exactly: time over that of one forward and backward pass of all samples",
            ["", "pass", *labels.values()],
            rows,
            ["median (20-80 %) of ratios of the same round; * the fastest; all results were compared before"],
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    absent = argparse.SUPPRESS
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), help="networks", default=absent)
    parser.add_argument("--samples", nargs="+", type=count, help="numbers of samples", default=[32, 128])
    parser.add_argument("--classes", nargs="+", type=count, help="numbers of classes among them", default=[2, 4, 10])
    parser.add_argument("--quick", action="store_true", help="the perceptron, few rounds: a look, not a measurement")
    add_run_arguments(
        parser,
        quick_repeats=LEAST,
        seconds=15.0,
        stop=f"stop the rounds of a case then, though not before {LEAST}",
        seed="of weights and samples",
    )
    options = parser.parse_args(arguments)
    options.network = getattr(options, "network", QUICK if options.quick else SIZES)
    most = max(options.classes)
    for network in options.network:
        if most > NETWORKS[network].classes:
            parser.error(
                f"argument --classes: got {most}, expected at most the {NETWORKS[network].classes} of {network}"
            )
    check_run(parser, options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    device = begin(options)
    result: dict[str, Any] = {
        "benchmark": "exact_gradients",
        "machine": prepare_machine(device),
        "arguments": run_values(options),
        "ways": {way.name: (way.label, way.gives) for way in Problem(Case("perceptron", 2, 2), device, 0).ways()},
        "cases": [],
    }
    for network, samples, classes in product(options.network, options.samples, options.classes):
        case = Case(network, samples, classes)
        say(f"{network}, {samples} samples of {classes} classes")
        result["cases"].append(measure(case, device, options.seed, options.repeats, options.seconds))
        result["machine"]["load_at_end"] = load_average()
        if "json" in options:  # after each case, so that a run cut short is not lost
            write_json(options.json, result)
    print_report(result)
    finish(options, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
