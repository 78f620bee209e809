"""How many calls of a selection reach a device. On a GPU each is a launch, of which the host makes 250,000 a second.

The CPU stands in for a GPU whose values must not be looked at (:mod:`no_looking`), with plain torch for the operators.
The aims are 60 in all, which captured graphs reach, and with Triton's mixing 12 kernels beside the network's own: it is
11, and two transfers, of the random numbers and of what the checks found. The limits below may only shrink.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from graph_stand_in import install_graphs
from no_looking import watched
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import gradmix
from gradmix import kernels
from gradmix.ops import mix_labels, mix_samples
from gradmix.ops.backends import Operator
from gradmix.runtime import deferred_checks

WITHOUT_A_LAUNCH = frozenset(
    [
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "permute",
        "promote_types",
        "scalar_tensor",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    ]
)
"""Operators of torch that only describe memory, or allocate it, or make a number of the host a tensor."""

MOST, MOST_OUTSIDE, MOST_WITH_GRAPHS, MOST_WITH_TRITON = 425, 95, 24, 16
"""All launches of a selection with marked samples, its forward pass and its mixing; those outside of the operators; all
if the selection and its checks are a graph, which is one launch; and if Triton does the mixing besides."""


class Launches(TorchDispatchMode):
    """Counts calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in WITHOUT_A_LAUNCH:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["calls", "graphs"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A selection by marked samples, and the mixing, after some alike; whether graphs are on; their recorder."""
    monkeypatch.setenv("GRADMIX_BACKEND", "torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y, marked = torch.randn(32, 64), torch.randint(10, (32,)), torch.arange(32) >= 16
    mixup = gradmix.GradMix(model, None, cuda_graph=request.param)

    send = deferred_checks._send

    def copy_of_flags(flags: Tensor, *more: Any) -> Any:
        return send(flags.clone(), *more)  # on a GPU it is a copy to the host, and a launch

    monkeypatch.setattr(deferred_checks, "_send", copy_of_flags)

    def call() -> tuple[Tensor, Tensor]:
        # The weight is drawn on the host.
        return mixup.select(x, y, replayed=marked, lam=0.3).mix()

    with install_graphs(monkeypatch) as recorder:
        call()  # finds the head, for which the host waits
        for _ in range(3):
            deferred_checks.raise_deferred(model)
            with watched(), Launches():  # as below, where the extension looks at nothing
                call()
        deferred_checks.raise_deferred(model)
        yield call, request.param, recorder
        deferred_checks.raise_deferred(model)


def check(count: int, limit: int, launches: Launches) -> None:
    """At most the limit, and not so far below that the limit holds nothing; older versions of torch make a few more."""
    known = torch.__version__ >= (2, 13)
    assert 0.9 * limit <= count <= (limit if known else 1.01 * limit), launches.counts.most_common()


def test_a_selection_makes_no_more_launches_than_before(step: Any) -> None:
    call, graphs, recorder = step
    before = recorder.replays
    with watched(), Launches() as launches:
        call()
    replays = recorder.replays - before
    assert (replays > 0) == graphs
    check(launches.counts.total() + replays, MOST_WITH_GRAPHS if graphs else MOST, launches)


@pytest.mark.skipif(kernels.unavailable_reason() is not None, reason=str(kernels.unavailable_reason()))
@pytest.mark.parametrize("step", [True], ids=["graphs"], indirect=True)
def test_mixing_by_triton_is_two_launches(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmix.kernels import mix_samples as kernel

    call, _, recorder = step
    choose, run, launched = Operator.choose, kernel.mix_samples, 0

    def by_triton(operator: Operator, backend: str, *arguments: Any) -> Any:
        if operator.name in ("mix_samples", "mix_labels"):
            # It refuses while somebody looks at the calls.
            return next(body for body in operator.backends if body.name == "triton")
        return choose(operator, backend, *arguments)

    def launch(*arguments: Any) -> None:
        nonlocal launched
        launched += 1
        with _disable_current_modes():  # the interpreter's
            run(*arguments)

    for operator in (mix_labels, mix_samples):
        monkeypatch.setattr(operator, "is_left_to_torch", lambda *_: False)
    monkeypatch.setattr(Operator, "choose", by_triton)
    monkeypatch.setattr(kernel, "mix_samples", launch)
    before = recorder.replays
    with watched(), Launches() as launches:
        call()
    assert launched == 2
    check(launches.counts.total() + launched + recorder.replays - before, MOST_WITH_TRITON, launches)


@pytest.mark.parametrize("step", [False], ids=["calls"], indirect=True)
def test_nor_outside_of_the_operators(step: Any) -> None:
    with Launches() as launches:
        step[0]()
    operators = {"mixed_alignment", "last_layer_gradient", "draw_partners", "mix_samples"} & launches.counts.keys()
    assert len(operators) >= 3
    check(launches.counts.total() - sum(launches.counts[name] for name in operators), MOST_OUTSIDE, launches)
