"""The project's own models: size, shape, values, initial weights, and what building them leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_truth import cosines, flat, sample_gradients
from torch import nn
from torch.nn import functional as F

import gradmix
from gradmix.training.methods.manifold_mixup import mixed_forward
from gradmix.training.models import (
    BasicBlock,
    Bottleneck,
    ImageNetResNet,
    NarrowResNet,
    TextTransformer,
    VisionTransformer,
    build_model,
)

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
    "resnet50, ImageNet": ("resnet50", (3, 224, 224), 1000, 25_557_032),
    "resnet18-imagenet, ImageNet": ("resnet18-imagenet", (3, 224, 224), 1000, 11_689_512),
    "vit-b16, ImageNet": ("vit-b16", (3, 224, 224), 1000, 86_567_656),
    "vit-tiny, ImageNet": ("vit-tiny", (3, 224, 224), 1000, 5_717_416),
    # patches of 4: 64 of them, 1 + 64 positions, a projection of 192 * 48 + 192 in place of 192 * 768 + 192
    "vit-tiny, CIFAR-10": ("vit-tiny", (3, 32, 32), 10, 5_717_416 - (197 - 65 + 768 - 48) * 192 - 990 * 193),
    "vit-tiny, 128 and more": ("vit-tiny", (3, 128, 160), 10, 5_717_416 - (197 - 81) * 192 - 990 * 193),
    "vit-tiny, one side of 128": ("vit-tiny", (1, 128, 64), 10, 5_717_416 + (513 - 197 + 16 - 768) * 192 - 990 * 193),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameter_count(case):
    name, shape, classes, expected = PARAMETERS[case]
    with torch.device("meta"):
        model = build_model(name, shape, classes)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_parameter_count_of_the_text_transformer():
    model = build_model("text-transformer", (50,), 20, vocabulary=1000)
    block = 3 * 128 * 129 + 128 * 129 + 512 * 129 + 128 * 513 + 4 * 128
    assert sum(p.numel() for p in model.parameters()) == 1000 * 128 + 50 * 128 + 2 * block + 2 * 128 + 20 * 129


FORWARDS = {
    "mlp": ("mlp", (1, 28, 28), 10, 5),
    "mlp, flat samples": ("mlp", (7,), 3, 5),
    "mlp, one row": ("mlp", (2, 3, 3), 1, 1),
    "resnet8, 8x8": ("resnet8", (3, 8, 8), 4, 3),
    "resnet20, odd size": ("resnet20", (1, 9, 7), 4, 2),
    "resnet32, one pixel": ("resnet32", (2, 1, 1), 2, 2),
    "resnet18, 8x8": ("resnet18", (3, 8, 8), 4, 3),
    "resnet18, odd size": ("resnet18", (1, 9, 7), 4, 2),
    "resnet18, one pixel": ("resnet18", (2, 1, 1), 2, 2),
    "resnet18-imagenet, odd size": ("resnet18-imagenet", (1, 37, 21), 4, 2),
    "resnet18-imagenet, one pixel": ("resnet18-imagenet", (2, 1, 1), 2, 2),
    "resnet50, odd size": ("resnet50", (3, 33, 35), 4, 2),
    "vit-tiny, one row": ("vit-tiny", (3, 8, 8), 4, 1),
    "vit-tiny, one patch": ("vit-tiny", (1, 4, 4), 3, 2),
    "vit-tiny, not square": ("vit-tiny", (2, 4, 12), 3, 2),
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


@pytest.mark.parametrize(("depth", "counts"), [(18, (2, 2, 2, 2)), (50, (3, 4, 6, 3))])
def test_imagenet_resnet_has_its_stem_and_four_stages(depth, counts):
    model = ImageNetResNet(3, 10, depth).eval()
    seen: list[tuple[int, ...]] = []
    for module in (model.conv1, *(block for stage in model.stages for block in stage)):
        module.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    wide = 4 if depth == 50 else 1
    stages = [(64 * wide, 16, 16), (128 * wide, 8, 8), (256 * wide, 4, 4), (512 * wide, 2, 2)]
    expected = [stage for stage, count in zip(stages, counts, strict=True) for _ in range(count)]
    assert seen == [(64, 32, 32), *expected]
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shortcuts = [m for b in model.modules() if isinstance(b, (BasicBlock, Bottleneck)) for m in b.shortcut.modules()]
    assert len(layers) - sum(isinstance(m, nn.Conv2d) for m in shortcuts) == depth


def test_imagenet_resnet_begins_with_shortcuts_alone():
    model = ImageNetResNet(3, 4, 50).eval()
    x = torch.randn(2, 3, 40, 40)
    h = F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 3, 2, padding=1)
    for stage in model.stages:
        for block in stage:
            h = F.relu(block.shortcut(h))
    torch.testing.assert_close(model(x), model.head(h.mean(dim=(2, 3))))


@pytest.mark.parametrize("depth", [0, 20, 34, 101])
def test_imagenet_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=f"depth: got {depth}, expected 18 or 50"):
        ImageNetResNet(3, 10, depth)


HIDDEN = {
    "mlp": ((1, 8, 8), [(256,), (256,)]),
    "resnet8": ((3, 8, 8), [(16, 8, 8), (32, 4, 4)]),
    "resnet32": ((3, 8, 8), [(16, 8, 8), (32, 4, 4)]),
    "resnet18": ((3, 8, 8), [(64, 8, 8), (128, 4, 4)]),
    "resnet18-imagenet": ((3, 32, 32), [(64, 8, 8), (128, 4, 4)]),
    "resnet50": ((3, 32, 32), [(256, 8, 8), (512, 4, 4)]),
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


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet18", "resnet18-imagenet", "vit-tiny"])
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


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet18", "resnet50", "vit-tiny"])
def test_head_is_the_last_linear_layer(name):
    model = build_model(name, (3, 8, 8), 6)
    assert isinstance(model.head, nn.Linear) and model.head.out_features == 6
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1] is model.head


def randomised(model, scale=0.3):
    """Every parameter random: initial zeros and ones, and small weights, would hide errors."""
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=scale, generator=g)
    return model


def tiny_vit(**more):
    settings = {"patch": 4, "width": 8, "depth": 2, "heads": 2, **more}
    return VisionTransformer((3, 8, 12), 4, **settings)


def test_vit_is_the_encoder_of_torch_on_patches():
    model = randomised(tiny_vit(depth=3)).double()
    x = torch.randn(5, 3, 8, 12, dtype=torch.float64)
    cut = x.unflatten(2, (2, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).reshape(5, 6, 48)
    h = cut @ model.patches.weight.flatten(1).T + model.patches.bias
    h = torch.cat([model.token.expand(5, 1, 8), h], 1) + model.positions
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            8, 2, 32, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        for theirs, ours in (
            (layer.linear1, block.fc1),
            (layer.linear2, block.fc2),
            (layer.norm1, block.norm1),
            (layer.norm2, block.norm2),
            (layer.self_attn.out_proj, block.attention.projection),
        ):
            theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
            layer.self_attn.in_proj_bias.copy_(block.attention.qkv.bias)
        h = layer(h)
    expected = F.layer_norm(h[:, 0], (8,), model.norm.weight, model.norm.bias, 1e-6) @ model.head.weight.T
    torch.testing.assert_close(model(x), expected + model.head.bias)


@pytest.mark.parametrize(("depth", "places"), [(1, (1,)), (2, (1,)), (3, (1, 2)), (4, (1, 3)), (12, (4, 8))])
def test_vit_hidden_stages_stand_after_each_third(depth, places):
    model = tiny_vit(depth=depth)
    assert model.hidden_stages == tuple((*model.blocks, model.norm)[place] for place in places)


def test_transformer_initial_weights():
    model = build_model("vit-tiny", (3, 32, 32), 10, seed=4)
    assert model.patches.weight.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and not module.bias.any()
    assert model.token.any() and model.positions.std().item() == pytest.approx(0.02, rel=0.05)


WHOLE = {
    "vit": (tiny_vit, lambda g: torch.randn(6, 3, 8, 12, generator=g)),
    "text": (
        lambda: TextTransformer(9, 5, 4, width=8, depth=2, heads=2),
        lambda g: torch.randint(1, 9, (6, 5), generator=g) * (torch.arange(5) <= torch.arange(6)[:, None]),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_gradients_of_rows_are_those_of_a_loop_for_every_parameter(case):
    build, draw = WHOLE[case]
    model = randomised(build()).double()
    x = draw(torch.Generator().manual_seed(1))
    x = x.double() if x.is_floating_point() else x
    y = torch.arange(6) % 4
    truth = sample_gradients(model, x, y)
    found = gradmix.sample_gradients(model, (x, y), sketch="identity")
    assert set(truth) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(found.cosine(), cosines(flat(truth), flat(truth)))
    per_class = gradmix.class_gradients(model, (x, y), sketch="identity").cosine()
    means = torch.stack([flat(truth)[y == label].mean(0) for label in range(4)])
    torch.testing.assert_close(per_class, cosines(means, means))


def test_jvp_of_a_vit_is_the_alignment_of_mixed_samples_in_a_loop():
    model = randomised(tiny_vit()).double()
    g = torch.Generator().manual_seed(1)
    x, old_x = (torch.randn(4, 3, 8, 12, generator=g, dtype=torch.float64) for _ in range(2))
    y, old_y = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 0])
    found = gradmix.alignment_matrix(model, (old_x, old_y), (x, y), lam=0.3, estimator=gradmix.JvpEstimator())
    reference = flat(sample_gradients(model, old_x, old_y)).mean(0, keepdim=True)
    soft = F.one_hot(y, 4).double()
    for i in range(4):
        mixed_y = 0.3 * soft[i] + 0.7 * soft
        rows = flat(sample_gradients(model, 0.3 * x[i] + 0.7 * x, mixed_y))
        torch.testing.assert_close(found.cosine[i], cosines(rows, reference)[:, 0])


def tiny_text(**more):
    return TextTransformer(**{"vocabulary": 9, "length": 6, "num_classes": 3, "width": 8, "heads": 2, **more})


IDS = torch.tensor([[3, 4, 5, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0], [0, 7, 0, 0, 8, 0]])


def test_padding_changes_no_logits():
    model = randomised(tiny_text()).double()
    torch.testing.assert_close(model(IDS[:1]), model(IDS[:1, :3]))
    assert not torch.allclose(model(IDS[:1]), model(IDS[:1, :2]))


def test_texts_are_read_apart():
    model = randomised(tiny_text()).double()
    torch.testing.assert_close(model(IDS), torch.cat([model(row[None]) for row in IDS]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_without_tokens_has_the_bias_and_finite_gradients(dtype):
    model = randomised(tiny_text())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(IDS)
    torch.testing.assert_close(logits[2].float(), model.head.bias, atol=0, rtol=8e-3)
    logits.float().logsumexp(1).sum().backward()
    for label, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), label
    model.zero_grad()
    model(IDS[2:3]).square().sum().backward()
    assert model.head.bias.grad.any() and not model.embedding.tokens.weight.grad.any()


def test_the_embedding_ends_in_the_presence_and_is_zero_at_padding():
    model = randomised(tiny_text())
    embedded = model.mixing_stage(IDS)
    assert model.mixing_stage is model.embedding and embedded.shape == (4, 6, 9)
    assert torch.equal(embedded[..., -1], (IDS != 0).float())
    expected = model.embedding.tokens.weight[IDS] + model.embedding.positions
    assert torch.equal(embedded[..., :-1], torch.where((IDS != 0)[..., None], expected, 0.0))


def test_the_rest_reads_presence_as_the_weight_of_a_position():
    """A position of presence p is worth as much as two of the same vector that share p between them."""
    model = randomised(tiny_text()).double()
    g = torch.Generator().manual_seed(2)
    presence = torch.tensor([[1.0, 0.3, 0.7, 0.0]], dtype=torch.float64)
    vectors = torch.randn(1, 4, 8, generator=g, dtype=torch.float64)
    rest = nn.Sequential(model.blocks, model.pooled, model.head)
    whole = rest(torch.cat([vectors, presence[..., None]], 2))
    share = torch.tensor([0.25, 0.6, 0.5, 0.5], dtype=torch.float64)
    halves = torch.cat([presence * share, presence * (1 - share)], 1)
    torch.testing.assert_close(rest(torch.cat([vectors.repeat(1, 2, 1), halves[..., None]], 2)), whole)
    present = torch.cat([vectors[:, :3], presence[:, :3, None]], 2)
    torch.testing.assert_close(rest(present), whole)
    pooled = model.pooled(present)
    normed = F.layer_norm(vectors[:, :3], (8,), model.pooled.norm.weight, model.pooled.norm.bias, 1e-6)
    torch.testing.assert_close(pooled, (presence[:, :3, None] * normed).sum(1) / 2.0)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_a_mixture_of_texts_is_a_text(lam):
    model = randomised(tiny_text()).double()
    partner = torch.tensor([1, 3, 0, 0])
    for stage in (model.blocks, *model.hidden_stages):
        mixed = mixed_forward(model, stage, IDS, partner, lam)
        assert torch.isfinite(mixed).all()
        if lam in (0.0, 1.0):
            torch.testing.assert_close(mixed, model(IDS if lam else IDS[partner]))
    # Text 2 has no token: at the last stage, what is left of the mixture is its partner alone.
    if lam < 1:
        torch.testing.assert_close(mixed_forward(model, model.pooled, IDS, partner, lam)[2], model(IDS[:1])[0])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_text_hidden_stages_keep_the_presence(depth):
    model = tiny_text(depth=depth)
    assert model.hidden_stages == (*model.blocks, model.pooled)[1 : min(3, depth + 1)]
    seen: list[torch.Tensor] = []
    for stage in model.hidden_stages:
        stage.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(IDS)
    for h in seen:
        assert torch.equal(h[..., -1], (IDS != 0).float()) and not h[IDS == 0].any() and h[IDS != 0].any()


def test_seed_settles_the_text_transformer():
    before = torch.random.get_rng_state()
    first, again, other = (build_model("text-transformer", (6,), 3, seed=s, vocabulary=9) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.embedding.tokens.weight, other.embedding.tokens.weight)
    assert first.embedding.positions.shape == (6, 128) and first.blocks[0].block.attention.heads == 4


def test_the_text_transformer_learns_which_word_is_in_a_text():
    model = build_model("text-transformer", (8,), 4, vocabulary=40)
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(512)
    x = torch.randint(5, 40, (512, 8), generator=g) * (torch.arange(8) < torch.randint(4, 9, (512, 1), generator=g))
    y = torch.randint(4, (512,), generator=g)
    x[rows, torch.randint(4, (512,), generator=g)] = 1 + y
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        drawn = torch.randint(384, (64,), generator=g)
        optimiser.zero_grad()
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        optimiser.step()
    assert (model(x[384:]).argmax(1) == y[384:]).float().mean() > 0.9


CALLS = {
    "floats": (torch.rand(2, 6), TypeError, "x: got torch.float32, expected token ids, int64"),
    "bools": (IDS != 0, TypeError, "x: got torch.bool"),
    "too long": (
        torch.ones(2, 7, dtype=torch.int64),
        ValueError,
        r"x: got \(2, 7\), expected \(N, T\) with T of 1 to 6",
    ),
    "no tokens": (torch.ones(2, 0, dtype=torch.int64), ValueError, r"x: got \(2, 0\)"),
    "one text bare": (IDS[0], ValueError, r"x: got \(6,\)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_text_transformer_refuses_other_rows(case):
    x, kind, message = CALLS[case]
    with pytest.raises(kind, match=message):
        tiny_text()(x)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 12), (3, 8, 12), (2, 3, 12, 8)])
def test_vit_refuses_other_sizes(shape):
    with pytest.raises(ValueError, match=r"x: got .*, expected \(N, 3, 8, 12\)"):
        tiny_vit()(torch.zeros(shape))


SETTINGS = {
    "heads": (lambda: tiny_vit(heads=3), "heads: got 3, expected a divisor of the width 8"),
    "no head": (lambda: tiny_text(heads=0), "heads: got 0"),
    "patch": (lambda: tiny_vit(patch=5), r"input_shape: got \(3, 8, 12\), expected sides that are multiples of 5"),
    "patch divides one side": (lambda: tiny_vit(patch=8), "multiples of 8"),
    "no block": (lambda: tiny_vit(depth=0), "depth: got 0"),
    "no block of text": (lambda: tiny_text(depth=0), "depth: got 0"),
    "padding only": (lambda: tiny_text(vocabulary=1), "vocabulary: got 1, expected at least 2"),
    "length": (lambda: tiny_text(length=0), "length: got 0"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_transformers_refuse_settings(case):
    make, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        make()


BAD = {
    "name": (
        ("vgg", (1, 8, 8), 2),
        "name: got 'vgg', expected one of 'mlp', 'resnet8', 'resnet20', 'resnet32', 'resnet18'",
    ),
    "no shape": (("mlp", (), 2), "input_shape: got"),
    "size 0": (("mlp", (3, 0), 2), r"input_shape: got \(3, 0\)"),
    "flat samples for resnet": (("resnet18", (64,), 2), r"input_shape: got \(64,\), expected \(C, H, W\)"),
    "flat samples for resnet8": (("resnet8", (64,), 2), r"input_shape: got \(64,\), expected \(C, H, W\) for resnet8"),
    "no classes": (("mlp", (4,), 0), "num_classes: got 0"),
    "vit, odd sides": (("vit-tiny", (3, 30, 32), 2), r"input_shape: got \(3, 30, 32\), expected sides .* of 4"),
    "vit, large, odd": (("vit-tiny", (3, 130, 132), 2), r"got \(3, 130, 132\), expected sides .* of 16"),
    "vit-b16 too small": (("vit-b16", (3, 8, 8), 2), "expected sides that are multiples of 16"),
    "flat samples for resnet50": (("resnet50", (64,), 2), r"expected \(C, H, W\) for resnet50"),
    "text, no vocabulary": (("text-transformer", (8,), 2), "vocabulary: got None, expected the number of token ids"),
    "text, images": (("text-transformer", (3, 8, 8), 2, 9), r"input_shape: got \(3, 8, 8\), expected \(T,\)"),
    "vocabulary of 1": (("text-transformer", (8,), 2, 1), "vocabulary: got 1, expected at least 2"),
    "vocabulary for images": (("resnet8", (3, 8, 8), 2, 9), "vocabulary: got 9, expected None: resnet8 takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (name, shape, classes, *vocabulary), message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, classes, vocabulary=vocabulary[0] if vocabulary else None)
