"""Launches of every kernel by its own launcher, executed by the machine and held against float64.

``run`` is called in the process of ``compiled.py``. Sizes are the smallest with several blocks, ragged edges and more
than one turn of every loop. Bounds are those of the tests on a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

WIDER = {"ieee": 1.0, "tf32x3": 1.0, "tf32": 5e3}
"""By how much the bound of float32 is widened."""

Results = tuple[Tensor, ...]


class Case(NamedTuple):
    """Attributes:
    call: launches the kernels; its results are new tensors.
    error: of results, in units of what is allowed.
    """

    call: Callable[[], Results]
    error: Callable[[Results], float]


class Outcome(NamedTuple):
    """Attributes:
    error: the largest, in units of what is allowed.
    same: whether every order of warps and blocks gave the same bits.
    without_barriers: ``"refused"`` for an access out of bounds, ``"NaN"``, ``"other"`` values, the ``"same"``, or
        ``"not run"``.
    launched: names of the kernels.
    blocks: of the largest grid.
    seconds: of the processor, compiling included.
    """

    error: float
    same: bool
    without_barriers: str
    launched: list[str]
    blocks: int
    seconds: float


@cache
def device() -> Any:
    from .device import install

    return install()


def run(name: str, seeds: tuple[int, ...], ignore_barriers: bool) -> Outcome:
    """Launch a case with all warps at once, with warps in the orders of the seeds and, if asked, without barriers."""
    from .machine import Order
    from .program import PTXError

    begun = time.process_time()
    machine, case = device(), CASES[name]()
    machine.launched.clear()
    machine.order = Order(together=True)
    expected = case.call()
    launched = list(machine.launched)
    same = True
    for seed in seeds:
        machine.order = Order(seed)
        same &= _equal(case.call(), expected)
    without = "not run"
    if ignore_barriers:
        machine.order = Order(ignore_barriers=True)
        try:
            raced = case.call()
        except PTXError:
            without = "refused"
        else:
            lost = any(part.is_floating_point() and bool(part.isnan().any()) for part in raced)
            without = "NaN" if lost else "same" if _equal(raced, expected) else "other"
    names = sorted({kernel for kernel, _, _ in launched})
    most = max(blocks for _, blocks, _ in launched)
    return Outcome(case.error(expected), same, without, names, most, time.process_time() - begun)


def _equal(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _unless_same(same: bool) -> float:
    """The error of results that are the same, or wrong."""
    return 0.0 if same else float("inf")


def _worst(parts: Results, exact: Results, bounds: list[float]) -> float:
    """The largest error over its bound; infinite where a result is NaN."""
    errors = [
        float((part - truth).abs().max()) / bound for part, truth, bound in zip(parts, exact, bounds, strict=True)
    ]
    return max(e if e == e else float("inf") for e in errors)


# -------------------------------------------------------------------------------------------------------- draw_partners


def draws(policy: str, own_rows: bool, with_mask: bool, columns: int, dtype: torch.dtype = torch.float32) -> Case:
    import test_draw_partners as operator
    from gradmix.kernels import draw_partners as kernel

    from gradmix.ops.draw_partners import draw_partners_torch

    # With own_rows there are as many rows as columns; the mask is then cut.
    v = operator.make(columns if own_rows else 5, columns, policy, own_rows, share=0.3, nan=0.2, dtype=dtype)
    allowed, drawn = v["allowed"] if with_mask else None, v["drawn"]
    score = v["score"] if policy == "best" else None

    def call() -> Results:
        return kernel.draw_partners(allowed, drawn, score, columns, policy == "permute", own_rows)

    exact = draw_partners_torch(allowed, drawn, score, columns, policy, own_rows)
    return Case(call, lambda results: _unless_same(_equal(results, tuple(exact))))


# ---------------------------------------------------------------------------------------------- mix_samples, mix_labels


def mixed(dtype: torch.dtype, shape: tuple[int, ...], m: int | None = None) -> Case:
    import test_mix_samples as operator

    from gradmix.ops.mix_samples import mix_samples_torch, mix_samples_triton

    arguments = operator.make(5, m, shape, dtype)
    exact = mix_samples_torch(*arguments)
    return Case(
        lambda: (mix_samples_triton(*arguments),),
        lambda results: _unless_same(torch.equal(operator.bits(results[0]), operator.bits(exact))),
    )


def mixed_labels(classes: int, dtype: torch.dtype) -> Case:
    import test_mix_samples as operator

    from gradmix.ops.mix_labels import mix_labels_torch, mix_labels_triton

    arguments = operator.make_labels(classes, dtype)
    exact = mix_labels_torch(*arguments)
    return Case(lambda: (mix_labels_triton(*arguments),), lambda results: _unless_same(_equal(results, (exact,))))


# -------------------------------------------------------------------------------------------------- last_layer_gradient


def gradients(precision: str, soft: bool, bias: bool, dtype: torch.dtype = torch.float32, **sizes: int) -> Case:
    import test_last_layer_gradient as operator
    from gradmix.kernels import last_layer_gradient as kernel

    arguments = operator.make(soft=soft, dtype=dtype, **sizes)
    h, z, y = arguments
    exact = operator.truth(arguments, bias)

    def call() -> Results:
        out = torch.ones_like(exact, dtype=torch.float32)
        kernel.last_layer_gradient(out, h, z, y, precision)
        return (out,)

    bound = 1e-5 if precision != "tf32" else 5e-3
    return Case(call, lambda results: _worst(results, (exact + 1,), [bound * float((exact + 1).abs().max())]))


# ----------------------------------------------------------------------------------------------------- cosine_alignment


def cosines(precision: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Case:
    import test_cosine_alignment as operator
    from gradmix.kernels import cosine_alignment as kernel

    from gradmix.ops.cosine_alignment import cosine_alignment

    x, y, _ = operator.make(**sizes, dtype=dtype)
    exact = cosine_alignment(x.double(), y.double(), backend="reference")
    return Case(
        lambda: (kernel.cosine_alignment(x, y, precision),),
        lambda results: _worst(results, (exact,), [1e-6 * WIDER[precision]]),
    )


def mixtures(precision: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Case:
    import test_cosine_alignment as operator
    from gradmix.kernels import cosine_alignment as kernel

    from gradmix.ops.cosine_alignment import mixed_gram_alignment

    x, y, reference = operator.make(**sizes, dtype=dtype)
    lam = torch.tensor([0.3], dtype=torch.float64)
    exact = mixed_gram_alignment(*(t.double() for t in (x, y, reference)), 0.3, backend="reference")
    length = float(torch.cat([x, y], 1).double().norm(dim=2).max())
    bounds = [1e-6 * length * float(reference.double().norm(dim=1).max()), 1e-6 * WIDER[precision] * length**2]
    return Case(
        lambda: tuple(kernel.mixed_gram_alignment(x, y, reference, lam, precision)),
        lambda results: _worst((results[0], results[1].double() ** 2), (exact.inner, exact.norm**2), bounds),
    )


# ------------------------------------------------------------------------------------------------------ mixed_alignment


def pairs(
    precision: str, soft: bool = False, lams: tuple[float, ...] = (0.3,), dtype: torch.dtype = torch.float32,
    group: int = 0, norms: bool = True, parts: int = 0, **sizes: Any,
) -> Case:  # fmt: skip
    """All pairs, or (group > 0) their sums over groups of samples of one side; inner products alone without norms.

    With parts > 0 the sums over classes and features are split into as many.
    """
    import mixed_pairs as operands
    import test_mixed_alignment as operator
    from gradmix.kernels import mixed_alignment as kernel

    arguments = operator.make(**sizes, soft=(soft, soft), dtype=torch.float32)
    for at in (0, 1, 3, 4):
        arguments[at] = arguments[at].to(dtype)
    weights = torch.tensor(lams, dtype=torch.float64)
    if group:
        arguments = [*arguments[:3], *arguments[:3], arguments[6]]
        rows = torch.randint(-1, len(arguments[0]), (3 * 16 + group,))
        exact = operands.grouped_truth(arguments, rows, group, *lams)
        inputs, bias = operands.prepared(arguments)

        def call() -> Results:
            return kernel.class_pair_sums(*inputs[:4], weights, rows, group, bias=bias, precision=precision)
    else:
        exact = operands.truth(arguments, *lams)
        inputs, bias = operands.prepared(arguments)
        choose = kernel.parts if not parts else lambda tiles, terms: parts

        def call() -> Results:
            with mock.patch.object(kernel, "parts", choose):
                results = kernel.mixed_alignment(*inputs, weights, bias=bias, precision=precision, norms=norms)
            return results if norms else results[:1]

    unit = 5e-3 if precision == "tf32" else 1e-5
    bounds = [unit * float(part.abs().max()) for part in exact]
    shown = 2 if norms else 1
    return Case(call, lambda results: _worst(results, tuple(exact)[:shown], bounds[:shown]))


# ---------------------------------------------------------------------------------------------------------------- cases

BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
TILE = {"n": 66, "m": 18, "classes": 19, "d": 21}
WIDE = {"n": 66, "m": 3, "classes": 39, "d": 70}
PRECISIONS = ("ieee", "tf32x3", "tf32")
ODD = {"layers": 2, "p": 33, "q": 35, "k": 37}
ROWS = {"n": 35, "classes": 37, "d": 67}

CASES: dict[str, Callable[[], Case]] = {
    "draw uniform": lambda: draws("uniform", False, True, 1030),
    "draw best of own rows": lambda: draws("best", True, True, 33),
    "draw permute": lambda: draws("permute", True, True, 130),
    "mixed samples": lambda: mixed(torch.float32, (3, 100)),
    "mixed samples of bfloat16": lambda: mixed(BF16, (77,), 3),
    "mixed labels": lambda: mixed_labels(10, torch.float32),
    "gradient tf32x3": lambda: gradients("tf32x3", False, True, **ROWS),
    "gradient tf32x3, rows shared out": lambda: gradients("tf32x3", False, True, n=140, classes=3, d=5),
    "gradient tf32 soft": lambda: gradients("tf32", True, False, **ROWS),
    "gradient ieee bfloat16": lambda: gradients("ieee", False, True, BF16, **ROWS),
    "cosines tf32x3": lambda: cosines("tf32x3", **ODD),
    "cosines ieee bfloat16": lambda: cosines("ieee", BF16, **ODD),
    "mixtures tf32": lambda: mixtures("tf32", **ODD),
    "pairs tf32x3, no norms": lambda: pairs("tf32x3", norms=False, **TILE),
    "pairs tf32x3, split": lambda: pairs("tf32x3", parts=3, **WIDE),
    "pairs tf32x3, lost": lambda: pairs("tf32x3", scale=300.0, n=2, m=3, classes=17, d=17),
}
"""Run every time: each kernel, with every kind of matrix product, copy and reduction. Compiling pairs of label vectors
takes nine seconds, too long for that."""

_DEFAULT = frozenset(CASES)


def is_chosen(name: str) -> bool:
    """Whether the case is run without GRADMIX_ALL_VARIANTS."""
    return name in _DEFAULT


def _add(name: str, make: Callable[..., Case], *arguments: Any, **sizes: Any) -> None:
    CASES[name] = lambda: make(*arguments, **sizes)


for _own, _mask, _columns in itertools.product((False, True), (False, True), (33, 513, 2050)):
    _of = f"{'own rows' if _own else 'others'}, {'masked' if _mask else 'all'}, {_columns} columns"
    if not _own or _columns == 33:
        for _type in (torch.float32, F64, BF16, F16):
            _add(f"draw best of {_of}, {_type}", draws, "best", _own, _mask, _columns, _type)
        _add(f"draw uniform of {_of}", draws, "uniform", _own, _mask, _columns)
        _add(f"draw permute of {_of}", draws, "permute", _own, _mask, _columns)
for _type, _shape in itertools.product((torch.float32, F64, BF16, F16), ((1,), (3, 16), (2100,))):
    _add(f"mixed samples of {_shape} {_type}", mixed, _type, _shape, 3)
for _type, _columns in itertools.product((torch.float32, F64), (3, 2100)):
    _add(f"mixed labels of {_columns} classes {_type}", mixed_labels, _columns, _type)
for _precision, _soft, _bias, _type in itertools.product(
    PRECISIONS, (False, True), (False, True), (torch.float32, BF16, F16)
):
    _of = f"{_precision} {'soft' if _soft else 'hard'} {'' if _bias else 'no '}bias {_type}"
    _add(f"gradient {_of}", gradients, _precision, _soft, _bias, _type, **ROWS)
    if _bias:
        _add(f"gradient {_of}, rows shared out", gradients, _precision, _soft, _bias, _type, n=140, classes=3, d=5)
for _precision, _type in itertools.product(PRECISIONS, (torch.float32, BF16)):
    for _soft in (False, True):
        _add(
            f"gradient {_precision} {'soft' if _soft else 'hard'} {_type}, large tiles",
            gradients, _precision, _soft, True, _type, n=19, classes=1000, d=1030,
        )  # fmt: skip
for _precision, _type in itertools.product(PRECISIONS, (torch.float32, BF16, F16)):
    for _name, _make in (("cosines", cosines), ("mixtures", mixtures)):
        _add(f"{_name} {_precision} {_type}", _make, _precision, _type, **ODD)
        if _type != F16:
            _add(f"{_name} {_precision} {_type}, large tiles", _make, _precision, _type, layers=64, p=66, q=65, k=19)
for _precision, _soft in itertools.product(PRECISIONS, (False, True)):
    _of = f"{_precision} {'soft' if _soft else 'hard'}"
    _add(f"pairs {_of}", pairs, _precision, _soft, **TILE)
    _add(f"pairs {_of}, no norms", pairs, _precision, _soft, norms=False, **TILE)
    _add(f"pairs {_of}, split", pairs, _precision, _soft, parts=3, **WIDE)
    _add(f"pairs {_of}, split, no norms", pairs, _precision, _soft, norms=False, parts=2, **WIDE)
    _add(f"pairs {_of}, several weights", pairs, _precision, _soft, (0.0, 0.3, 1.0), **TILE)
    _add(f"pairs {_of}, no bias, groups of 16", pairs, _precision, _soft, (0.2, 0.6), group=16, bias=False, **TILE)
    if _precision != "tf32":
        _add(f"pairs {_of}, lost", pairs, _precision, _soft, scale=300.0, n=2, m=3, classes=19, d=21)
        _add(f"pairs {_of}, split, lost", pairs, _precision, _soft, parts=2, scale=300.0, n=2, m=3, classes=19, d=21)
for _group in (1, 2, 8):
    _add(f"pairs tf32x3 hard, groups of {_group}", pairs, "tf32x3", group=_group, **TILE)
_add("pairs tf32x3 hard, aligned", pairs, "tf32x3", n=64, m=32, classes=32, d=48)
_add("pairs tf32x3 hard, one of each", pairs, "tf32x3", n=1, m=1, classes=2, d=1)  # of one class all is zero
for _type in (BF16, F16):
    _add(f"pairs tf32x3 hard {_type}", pairs, "tf32x3", False, (0.3,), _type, **TILE)
    _add(f"pairs tf32x3 hard {_type}, split", pairs, "tf32x3", False, (0.3,), _type, parts=2, **WIDE)
for _precision in PRECISIONS:
    _add(f"pairs {_precision} hard, large tiles", pairs, _precision, n=130, m=890, classes=19, d=21)
