"""The protocol's models: size, shape, initial weights, and what building them leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradmix.training.models import BasicBlock, NarrowResNet, build_model

PARAMETERS = {
    # 784*256+256 + 256*256+256 + 256*10+10
    "mlp, MNIST": ("mlp", (1, 28, 28), 10, 269_322),
    "mlp, digits": ("mlp", (1, 8, 8), 10, 64 * 256 + 256 + 256 * 256 + 256 + 2570),
    "resnet18, CIFAR-10": ("resnet18", (3, 32, 32), 10, 11_173_962),
    "resnet18, CIFAR-100": ("resnet18", (3, 32, 32), 100, 11_173_962 + 90 * 513),
    # stem 27*16; stages of 2 * (9*16*16), 9*16*32 + 9*32*32 + 16*32, 9*32*64 + 9*64*64 + 32*64; norms; head 650
    "resnet8, CIFAR-10": (
        "resnet8",
        (3, 32, 32),
        10,
        432 + 4608 + 14_336 + 57_344 + 2 * (3 * 16 + 3 * 32 + 3 * 64) + 650,
    ),
    "resnet20, CIFAR-10": ("resnet20", (3, 32, 32), 10, 272_474),
    # each further block of a stage: 2 convolutions, 2 norms
    "resnet32, CIFAR-10": (
        "resnet32",
        (3, 32, 32),
        10,
        272_474 + 2 * sum(2 * (9 * c * c + 2 * c) for c in (16, 32, 64)),
    ),
    "resnet32, CIFAR-100": ("resnet32", (3, 32, 32), 100, 466_906 + 90 * 65),
    "resnet18, grey": ("resnet18", (1, 32, 32), 10, 11_173_962 - 2 * 9 * 64),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameter_count(case):
    name, shape, classes, expected = PARAMETERS[case]
    assert sum(p.numel() for p in build_model(name, shape, classes).parameters()) == expected


FORWARDS = {
    "mlp": ("mlp", (1, 28, 28), 10, 5),
    "mlp, flat rows": ("mlp", (7,), 3, 5),
    "mlp, one row": ("mlp", (2, 3, 3), 1, 1),
    "resnet8, 8x8": ("resnet8", (3, 8, 8), 4, 3),
    "resnet20, odd size": ("resnet20", (1, 9, 7), 4, 2),
    "resnet32, one pixel": ("resnet32", (2, 1, 1), 2, 2),
    "resnet18, 8x8": ("resnet18", (3, 8, 8), 4, 3),
    "resnet18, odd size": ("resnet18", (1, 9, 7), 4, 2),
    "resnet18, one pixel": ("resnet18", (2, 1, 1), 2, 2),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_forward_shape_and_gradients_everywhere(case):
    name, shape, classes, rows = FORWARDS[case]
    model = build_model(name, shape, classes)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    assert logits.shape == (rows, classes) and logits.dtype == torch.float32 and model.training
    logits.square().sum().backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), label


def test_mlp_is_its_formula():
    model = build_model("mlp", (1, 4, 4), 3, seed=1)
    x = torch.randn(6, 1, 4, 4)
    hidden = x.reshape(6, 16)
    for layer in (model.fc1, model.fc2):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)
    assert [tuple(p.shape) for p in (model.fc1.weight, model.fc2.weight)] == [(256, 16), (256, 256)]


def test_resnet_keeps_the_stem_and_halves_three_times():
    model = build_model("resnet18", (3, 32, 32), 10).eval()
    seen: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[1:])))
        for module in (model.conv1, *model.blocks)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    stages = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert seen == [(64, 32, 32)] + [stage for stage in stages for _ in range(2)]
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3), ("resnet32", 5)])
def test_narrow_resnet_has_three_stages(name, blocks):
    model = build_model(name, (3, 32, 32), 10).eval()
    seen: list[tuple[int, ...]] = []
    for module in (model.conv1, *model.blocks):
        module.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    stages = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert seen == [(16, 32, 32)] + [stage for stage in stages for _ in range(blocks)]
    layers = [
        m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and getattr(m, "kernel_size", 0) != (1, 1)
    ]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("depth", [2, 9, 18, -4])
def test_narrow_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=f"depth: got {depth}, expected 6n \\+ 2"):
        NarrowResNet(3, 10, depth)


HIDDEN = {
    "mlp": ((1, 8, 8), [(256,), (256,)]),
    "resnet8": ((3, 8, 8), [(16, 8, 8), (32, 4, 4)]),
    "resnet32": ((3, 8, 8), [(16, 8, 8), (32, 4, 4)]),
    "resnet18": ((3, 8, 8), [(64, 8, 8), (128, 4, 4)]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_stages_take_in_the_first_two_after_relu(name):
    shape, expected = HIDDEN[name]
    model = build_model(name, shape, 3)
    seen: list[torch.Tensor] = []
    for stage in model.hidden_stages:
        stage.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(torch.randn(2, *shape))
    assert [tuple(h.shape[1:]) for h in seen] == expected
    assert all((h >= 0).all() and (h == 0).any() for h in seen)


def test_block_adds_its_input():
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.clamp(min=0))


def test_resnet_initial_weights():
    model = build_model("resnet18", (3, 32, 32), 10, seed=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 50_000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and not module.bias.any()


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet18"])
def test_seed_settles_the_weights_and_no_global_state_is_touched(name):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    cuda_before = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    first, again, other = (build_model(name, (1, 8, 8), 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    if torch.cuda.is_available():
        assert all(map(torch.equal, torch.cuda.get_rng_state_all(), cuda_before))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.head.weight, other.head.weight)
    torch.manual_seed(5)
    assert torch.equal(build_model(name, (1, 8, 8), 3, seed=1).head.weight, first.head.weight)


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet18"])
def test_head_is_the_last_linear_layer(name):
    model = build_model(name, (3, 8, 8), 6)
    assert isinstance(model.head, nn.Linear) and model.head.out_features == 6
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1] is model.head


BAD = {
    "name": (
        ("vgg", (1, 8, 8), 2),
        "name: got 'vgg', expected one of 'mlp', 'resnet8', 'resnet20', 'resnet32', 'resnet18'",
    ),
    "no shape": (("mlp", (), 2), "input_shape: got"),
    "size 0": (("mlp", (3, 0), 2), r"input_shape: got \(3, 0\)"),
    "flat rows for resnet": (("resnet18", (64,), 2), r"input_shape: got \(64,\), expected \(C, H, W\)"),
    "flat rows for resnet8": (("resnet8", (64,), 2), r"input_shape: got \(64,\), expected \(C, H, W\) for resnet8"),
    "no classes": (("mlp", (4,), 0), "num_classes: got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)
