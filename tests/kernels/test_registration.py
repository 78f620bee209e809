"""Whatever records operators sees one of the library's as one call, though eager code calls its body as it is."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gradmix.ops.draw_partners import draw_partners_op
from gradmix.ops.last_layer_gradient import last_layer_gradient_op
from gradmix.ops.mixed_alignment import mixed_alignment_op

LABELS = torch.tensor([0, 2, 1, 1])
LAM = torch.tensor([0.3], dtype=torch.float64)


def gradient(features, logits):
    total = torch.zeros(3, 6)
    last_layer_gradient_op(total, features, logits, LABELS, "tf32x3", "auto")
    return total


def alignment(features, logits):
    side = features, logits, LABELS
    return mixed_alignment_op(*side, *side, torch.ones(3, 6), LAM, True, "tf32x3", "auto")[0]


def draw(features, logits):
    return draw_partners_op(
        features @ features.T > 0, logits[:, 0].sigmoid().double(), None, 4, "uniform", True, "auto"
    )[0]


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


@pytest.mark.parametrize("function", [gradient, alignment, draw])
@pytest.mark.parametrize("trace", ["make_fx", "jit"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_trace_is_of_the_function_and_not_of_its_values(function, trace, samples):
    traced = make_fx(function)(*samples) if trace == "make_fx" else torch.jit.trace(function, samples)
    features, logits = (2 * x.flip(0) for x in samples)
    torch.testing.assert_close(traced(features, logits), function(features, logits))


@pytest.mark.parametrize("function", [gradient, alignment, draw])
def test_a_mode_sees_one_call(function, samples):
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Record():
        function(*samples)
    assert seen.count("gradmix") == 1
