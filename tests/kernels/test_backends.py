"""Every body of every operator, through the function that users call: values and decisions against float64.

Bodies that cannot run on a machine are skipped with their reason; the pairs that no test ran are printed by
tests/bodies_run.py. What a single operator owes is tested beside it; this is what all of them owe.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import bodies_run
import pytest
import torch
from models import CLASSES, MLP, rows
from torch import Tensor
from truth import assert_decisions_agree

import gradmix
from gradmix import captured_selection, doctor, select_pairs
from gradmix.ops.backends import Backend, Operator, set_backend
from gradmix.ops.class_pairs import class_pair_alignment
from gradmix.ops.class_sketch import class_sketch
from gradmix.ops.cosine_alignment import cosine_alignment, mixed_gram_alignment
from gradmix.ops.counter_random import random_matrix
from gradmix.ops.draw_partners import draw_partners
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mix_labels import mix_labels
from gradmix.ops.mix_samples import mix_samples
from gradmix.ops.mixed_alignment import Side, mixed_alignment

BODIES = [(operator, body) for operator in doctor.OPERATORS for body in operator.backends]
N, M, C, D, LAM = 9, 7, 6, 5, 0.3


def needs(body: Backend) -> None:
    reason = body.available()
    if reason is not None:
        pytest.skip(f"{body.name}: {reason}")


class Problem:
    """Rows on the device that a body wants, and the truth in float64 on the CPU, pair by pair."""

    def __init__(self, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.h, self.z, self.h_b, self.z_b = (
            torch.randn(n, width, generator=g).to(device) for n in (N, M) for width in (D, C)
        )
        self.y, self.y_b = torch.arange(N, device=device) % C, torch.arange(M, device=device) * 2 % C
        self.reference = torch.randn(C, D + 1, generator=g).to(device)
        self.x = torch.randn(2, N, D, generator=g).to(device)
        self.x_b = torch.randn(2, M, D, generator=g).to(device)
        self.target = torch.randn(2, D, generator=g).to(device)
        self.deltas, self.activations = (torch.randn(N, 3, k, generator=g).to(device) for k in (4, D))
        self.drawn = torch.rand(N, generator=g, dtype=torch.float64).to(device)
        self.allowed = (torch.rand(N, M, generator=g) < 0.6).to(device)

    def gradient(self, h: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """(C, D + 1), of one row, by autograd."""
        weight = torch.zeros(C, D + 1, dtype=torch.float64, requires_grad=True)
        features = torch.cat([h.double().cpu(), torch.ones(1, dtype=torch.float64)])
        logits = weight @ features + z.double().cpu()
        (gradient,) = torch.autograd.grad(-(y * logits.log_softmax(0)).sum(), weight)
        return gradient

    def pairs(self, h_b: Tensor, z_b: Tensor, y_b: Tensor) -> tuple[Tensor, Tensor]:
        """(inner, norm), of all pairs of the rows with others, mixed in feature space."""
        one_hot = torch.eye(C, dtype=torch.float64)
        inner = torch.empty(N, len(h_b), dtype=torch.float64)
        norm = torch.empty_like(inner)
        for i in range(N):
            for j in range(len(h_b)):
                parts = [
                    LAM * a.double().cpu() + (1 - LAM) * b.double().cpu()
                    for a, b in ((self.h[i], h_b[j]), (self.z[i], z_b[j]), (one_hot[self.y[i]], one_hot[y_b[j]]))
                ]
                gradient = self.gradient(*parts)
                inner[i, j], norm[i, j] = (gradient * self.reference.double().cpu()).sum(), gradient.norm()
        return inner, norm

    def by_class(self) -> tuple[Tensor, Tensor]:
        """Means of :meth:`pairs` over the rows of each pair of classes, no row with itself."""
        means = []
        for value in self.pairs(self.h, self.z, self.y):
            cells = torch.full((1, C, C), torch.nan, dtype=torch.float64)
            for a in range(C):
                for b in range(C):
                    chosen = [value[i, j] for i in range(N) for j in range(N) if i != j and (i % C, j % C) == (a, b)]
                    if chosen:
                        cells[0, a, b] = torch.stack(chosen).mean()
            means.append(cells)
        return means[0], means[1]


def mixed(p: Problem, backend: str) -> tuple[Any, Any]:
    got = mixed_alignment(
        Side(p.h, p.z, p.y), Side(p.h_b, p.z_b, p.y_b), p.reference, LAM, precision="ieee", backend=backend
    )
    return got, p.pairs(p.h_b, p.z_b, p.y_b)


def class_pairs(p: Problem, backend: str) -> tuple[Any, Any]:
    lams = torch.tensor([LAM], dtype=torch.float64)
    return class_pair_alignment(Side(p.h, p.z, p.y), p.y, C, p.reference, lams, backend=backend), p.by_class()


def last_layer(p: Problem, backend: str) -> tuple[Any, Any]:
    one_hot = torch.eye(C, dtype=torch.float64)
    total = sum(p.gradient(p.h[i], p.z[i], one_hot[p.y[i]]) for i in range(N))
    return (last_layer_gradient(p.h, p.z, p.y, precision="ieee", backend=backend),), (total,)


def cosines(p: Problem, backend: str) -> tuple[Any, Any]:
    a, b = p.x.double().cpu(), p.x_b.double().cpu()
    expected = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=3)
    return (cosine_alignment(p.x, p.x_b, precision="ieee", backend=backend),), (expected,)


def mixed_gram(p: Problem, backend: str) -> tuple[Any, Any]:
    mixtures = LAM * p.x.double().cpu()[:, :, None] + (1 - LAM) * p.x_b.double().cpu()[:, None]
    expected = (mixtures * p.target.double().cpu()[:, None, None]).sum(3), mixtures.norm(dim=3)
    return mixed_gram_alignment(p.x, p.x_b, p.target, LAM, precision="ieee", backend=backend), expected


def sketched_classes(p: Problem, backend: str) -> tuple[Any, Any]:
    deltas, activations = p.deltas.double().cpu(), p.activations.double().cpu()
    each = torch.einsum("ntk,ntj->nkj", deltas, activations)
    sums, squares = torch.zeros(C, *each.shape[1:], dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    for label, gradient in zip(p.y.tolist(), each, strict=True):
        sums[label] += gradient
        squares[label] += gradient.square().sum()
    return class_sketch(p.deltas, p.activations, p.y, C, backend=backend), (sums, squares)


def projected(p: Problem, backend: str) -> tuple[Any, Any]:
    from gradmix.ops.sketch_project import sketch_project

    matrix = random_matrix(8, D + 1, 3, "rademacher", dtype=torch.float64, device=torch.device("cpu"))
    x = p.activations.double().cpu()
    expected = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=torch.float64)], 2) @ matrix.T
    return (sketch_project(p.activations, 8, 3, ones=True, backend=backend),), (expected,)


def drawn(p: Problem, backend: str) -> tuple[Any, Any]:
    partner, found = [], []
    for i in range(N):
        columns = [j for j in range(M) if p.allowed[i, j]]
        found.append(bool(columns))
        partner.append(columns[int(float(p.drawn[i]) * len(columns))] if columns else 0)
    return draw_partners(p.allowed, p.drawn, backend=backend), (torch.tensor(partner), torch.tensor(found))


def mixed_samples(p: Problem, backend: str) -> tuple[Any, Any]:
    partner, lam = p.y_b[p.y % M], p.drawn.float()
    weight = lam.double().cpu()[:, None]
    h, h_b = p.h.double().cpu(), p.h_b.double().cpu()
    expected = weight * h + (1 - weight) * h_b[partner.cpu()]
    return (mix_samples(p.h, p.h_b, partner, lam, backend=backend),), (expected,)


def mixed_labels(p: Problem, backend: str) -> tuple[Any, Any]:
    partner, lam = p.y_b[p.y % M], p.drawn.float()
    expected = torch.zeros(N, C, dtype=torch.float64)
    for i in range(N):
        expected[i, p.y[i]] += lam[i].cpu()
        expected[i, p.y_b[partner[i]]] += 1 - lam[i].cpu()
    return (mix_labels(p.y, p.y_b, partner, lam, C, backend=backend),), (expected,)


def selected(p: Problem, backend: str) -> tuple[Any, Any]:
    helpful = p.pairs(p.h, p.z, p.y)[0] >= 0
    helpful.fill_diagonal_(False)
    expected = draw_partners(helpful, p.drawn.cpu(), own_rows=True, backend="reference")
    arguments = p.h, p.z, p.y, N, p.reference, p.drawn
    if backend != "cuda_graph":
        return captured_selection.OPERATOR.choose(backend, *arguments).run(*arguments), expected
    graph = captured_selection.OPERATOR.backends[0]  # no name that users choose by
    for _ in range(2):  # called, and then captured
        results = graph.run(*arguments)
    bodies_run.ran.add(("selection", graph.name))
    return results, expected


CALLS: dict[str, Callable[[Problem, str], tuple[Any, Any]]] = {
    "mixed_alignment": mixed,
    "class_pair_alignment": class_pairs,
    "last_layer_gradient": last_layer,
    "draw_partners": drawn,
    "selection": selected,
    "mix_labels": mixed_labels,
    "mix_samples": mixed_samples,
    "cosine_alignment": cosines,
    "mixed_gram_alignment": mixed_gram,
    "class_sketch": sketched_classes,
    "sketch_project": projected,
}


def test_every_operator_is_called() -> None:
    assert set(CALLS) == {operator.name for operator in doctor.OPERATORS}


@pytest.mark.parametrize("operator, body", BODIES, ids=[f"{o.name}-{b.name}" for o, b in BODIES])
def test_every_body_gives_the_value_and_the_decision(operator: Operator, body: Backend) -> None:
    needs(body)
    device = "cuda" if torch.cuda.is_available() and body.name in ("cuda", "cuda_graph", "triton") else "cpu"
    bodies_run.ran.discard((operator.name, body.name))
    results, expected = CALLS[operator.name](Problem(device), body.name)
    assert (operator.name, body.name) in bodies_run.ran
    for result, truth in zip(results, expected, strict=True):
        result = result.cpu()
        if not result.is_floating_point():
            assert torch.equal(result, truth)
            continue
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert_decisions_agree(result.nan_to_num(), truth.nan_to_num())


@pytest.mark.parametrize("by_setting", [False, True], ids=["argument", "set_backend"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("backend", ["reference", "triton", "torch", "cpp"])
def test_select_pairs_chooses_the_same_by_every_backend(backend: str, criterion: str, by_setting: bool) -> None:
    if backend in ("triton", "cpp"):
        needs(next(b for b in doctor.OPERATORS[0].backends if b.name == backend))
        if backend == "triton" and torch.cuda.is_available():
            pytest.skip("the rows are on the CPU, and Triton's interpreter is off")
    model, batch, buffer = MLP(), rows(9, 1), rows(12, 2)
    how = {"lam": 0.6, "criterion": criterion}
    expected = select_pairs(model, buffer, batch, generator=torch.Generator().manual_seed(0), backend="torch", **how)
    if by_setting:
        set_backend(backend)
    else:
        how["backend"] = backend
    pairs = select_pairs(model, buffer, batch, generator=torch.Generator().manual_seed(0), **how)
    assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.helpful, expected.helpful)
    torch.testing.assert_close(pairs.alignment, expected.alignment, rtol=0, atol=2e-6, equal_nan=True)
    assert pairs.mix()[1].shape == (9, CLASSES)


def test_the_pairs_that_no_test_ran_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_run, "ran", set())
    missing = bodies_run.not_run()
    assert missing[("mixed_alignment", "reference")] is None and ("class_sketch", "cuda") in missing
    x = torch.ones(1, 2, 3)
    cosine_alignment(x, x, backend="reference")
    assert bodies_run.ran == {("cosine_alignment", "reference")}


def test_python_m_pytest_meets_the_installed_package(tmp_path: Path) -> None:
    """In a checkout, whose own gradmix/ comes first on the path then."""
    here = Path(__file__).parents[1]
    (tmp_path / "tests").mkdir()
    (tmp_path / "gradmix").mkdir()
    (tmp_path / "gradmix" / "__init__.py").write_text("raise ImportError('this is the checkout')\n")
    for name in ("conftest.py", "bodies_run.py", "fast_set.py", "quick_interpreter.py"):
        copy(here / name, tmp_path / "tests")
    copy(here.parent / "pyproject.toml", tmp_path)
    package = Path(gradmix.__file__).parent
    (tmp_path / "tests" / "test_place.py").write_text(
        f"def test_place():\n    import gradmix\n    assert gradmix.__file__.startswith({str(package)!r})\n"
    )
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_place.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0 and "1 passed" in answer.stdout, answer.stdout + answer.stderr
