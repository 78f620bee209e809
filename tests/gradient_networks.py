"""Networks for the gradient engine's tests: one layer at a time, ways of using parameters, and whole architectures.

Every weight is random, the initial ones and zeros of normalisation layers included: they would hide errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A model and the rows that it takes.

    Attributes:
        build: makes the model.
        shape: of one row, without N.
        tokens: rows are integers below it; 0: they are normal numbers.
        rows: N.
        classes: of the labels.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    rows: int = 3
    classes: int = 4
    soft: bool = False
    arrange: Callable[[Tensor], Tensor] = field(default=lambda x: x)

    def batch(
        self, rows: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        """x (N, *shape) and y, (N,) or, soft, (N, classes)."""
        g = torch.Generator().manual_seed(seed)
        n = self.rows if rows is None else rows
        if self.tokens:
            x = torch.randint(self.tokens, (n, *self.shape), generator=g)
        else:
            x = torch.randn(n, *self.shape, generator=g, dtype=torch.float64).to(dtype)
        if self.soft:
            y = torch.softmax(torch.randn(n, self.classes, generator=g, dtype=torch.float64), 1).to(dtype)
        else:
            y = torch.randint(self.classes, (n,), generator=g)
        return self.arrange(x), y

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The model with random weights and statistics, in training mode, as a training step has it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            randomise(model)
        return model.to(dtype).train()


def randomise(model: nn.Module) -> None:
    """Random values wherever a layer starts at zero or one, and random running statistics."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) and name == "weight":
                p.data.uniform_(0.5, 1.5).mul_(torch.randint(2, p.shape) * 2 - 1)
            elif p.ndim <= 1 or not p.any():
                p.data.normal_(0, 0.5)
        if isinstance(module, (nn.modules.batchnorm._NormBase,)) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)


NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Project(nn.Module):
    """Logits from features of any shape (N, ...) without a parameter: a smooth function, then a fixed random matrix."""

    def __init__(self, features: int, classes: int = 4) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(features, classes) / math.sqrt(features) * 2)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h).flatten(1) @ self.matrix


class Around(nn.Module):
    """A module between the input and the logits."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...], tokens: int = 0) -> None:
        super().__init__()
        self.module = module
        with torch.no_grad():
            x = torch.zeros(2, *shape, dtype=torch.int64 if tokens else torch.float32)
            self.after = Project(module.eval()(x).flatten(1).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.module(x))


def around(make: Callable[[], nn.Module], *shape: int, tokens: int = 0, **more: Any) -> Case:
    return Case(lambda: Around(make(), shape, tokens), shape, tokens, **more)


class Deep(nn.Module):
    """A layer applied to every number of the input, before a model that must hand it a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(1, 1)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.before(x.unsqueeze(-1)).squeeze(-1))


def deepened(case: Case) -> Case:
    return replace(case, build=lambda: Deep(case.build()))


class Slope(nn.Module):
    """Uses a parameter in a way without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((5,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope.exp())


class Net(nn.Module):
    """Parameters and modules by name, and a function (self, x) that uses them."""

    def __init__(self, use: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def net(make: Callable[[], dict[str, Any]], use: Callable[[Any, Tensor], Any], *shape: int, **more: Any) -> Case:
    """A :class:`Net` followed by fixed logits."""
    tokens = more.get("tokens", 0)
    return Case(lambda: Around(Net(use, **make()), shape, tokens), shape, **more)


def logits(make: Callable[[], dict[str, Any]], use: Callable[[Any, Tensor], Any], *shape: int, **more: Any) -> Case:
    """A :class:`Net` that returns the logits itself."""
    return Case(lambda: Net(use, **make()), shape, **more)


def only(name: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``make``, with every parameter frozen but those whose last name is ``name``."""

    def build() -> nn.Module:
        module = make()
        for full, p in module.named_parameters():
            p.requires_grad_(full.rsplit(".", 1)[-1] == name)
        return module

    return build


# ------------------------------------------------------------------------------------------------------- single layers

LINEAR = {
    "linear": around(lambda: nn.Linear(5, 7), 5),
    "linear without bias": around(lambda: nn.Linear(5, 7, bias=False), 5),
    "linear, one feature in and out": around(lambda: nn.Linear(1, 1), 1),
    "linear, one leading position": around(lambda: nn.Linear(5, 6), 1, 5),
    "linear over positions": around(lambda: nn.Linear(5, 7), 4, 5),
    "linear over positions without bias": around(lambda: nn.Linear(5, 7, bias=False), 4, 5),
    "linear over two leading dimensions": around(lambda: nn.Linear(5, 7), 3, 4, 5),
    "linear, many positions": around(lambda: nn.Linear(3, 2), 70, 3),
    "linear, as many positions as rows": around(lambda: nn.Linear(5, 7), 4, 5, rows=4),
    "linear, all sizes the same": around(lambda: nn.Linear(4, 4), 4, 4, 4, rows=4),
    "linear, one row": around(lambda: nn.Linear(5, 7), 4, 5, rows=1),
    "linear, no position": around(lambda: nn.Linear(5, 7), 0, 5),
    "linear, only its bias trained": around(only("bias", lambda: nn.Linear(5, 7)), 4, 5),
    "linear, only its weight trained": around(only("weight", lambda: nn.Linear(5, 7)), 4, 5),
    "linear, only its bias trained, no positions": around(only("bias", lambda: nn.Linear(5, 7)), 5),
    "linear on sliced input": around(lambda: nn.Linear(5, 7), 4, 5, arrange=lambda x: x.repeat(1, 2, 2)[:, ::2, ::2]),
    "linear on transposed input": around(
        lambda: nn.Linear(5, 7), 4, 5, arrange=lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)
    ),
    "linear on expanded input": around(lambda: nn.Linear(5, 7), 4, 5, arrange=lambda x: x[:, :1].expand(-1, 4, -1)),
}

SHAPES = {1: (4, 9), 2: (4, 7, 6), 3: (4, 5, 4, 3)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

CONV_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "stride past the edge": {"stride": 3, "kernel_size": 2},
    "stride beyond the kernel": {"stride": 3, "kernel_size": 1},
    "dilation": {"dilation": 2, "kernel_size": 2},
    "padding": {"padding": 2},
    "padding beyond the kernel": {"padding": 2, "kernel_size": 1},
    "padding same": {"padding": "same"},
    "padding same, even kernel": {"padding": "same", "kernel_size": 2},
    "padding same, dilation": {"padding": "same", "kernel_size": 2, "dilation": 2},
    "padding valid": {"padding": "valid"},
    "groups": {"groups": 2},
    "groups without bias": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4, "out": 4, "padding": 1},
    "depthwise, two a channel": {"groups": 4, "out": 8},
    "kernel 1": {"kernel_size": 1},
    "kernel 1, groups": {"kernel_size": 1, "groups": 2},
    "even kernel": {"kernel_size": 2, "stride": 2, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "reflect, padding same": {"padding": "same", "padding_mode": "reflect"},
    "circular, padding same, even kernel": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    "replicate, padding same, dilation": {"padding": "same", "padding_mode": "replicate", "dilation": 2},
    "everything": {
        "stride": 2,
        "dilation": 2,
        "kernel_size": 2,
        "padding": 2,
        "groups": 2,
        "padding_mode": "circular",
    },
}
NOT_SQUARE: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "conv2d, not square": (
        nn.Conv2d,
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2), "groups": 2},
    ),
    "conv2d, not square, reflect": (
        nn.Conv2d,
        {"kernel_size": (1, 3), "padding": (0, 2), "padding_mode": "reflect"},
    ),
    "conv2d, not square, circular": (
        nn.Conv2d,
        {"kernel_size": (2, 3), "padding": (2, 1), "stride": (1, 2), "padding_mode": "circular"},
    ),
    "conv2d, not square, same": (nn.Conv2d, {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)}),
    "conv3d, not cubic": (
        nn.Conv3d,
        {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (0, 1, 2), "dilation": (2, 1, 1)},
    ),
    "conv_transpose2d, not square": (
        nn.ConvTranspose2d,
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2},
    ),
}
TRANSPOSED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "output padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out": 4},
    "dilation": {"dilation": 2, "kernel_size": 2},
    "kernel 1": {"kernel_size": 1},
    "everything": {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2, "kernel_size": 2},
}


def _conv(kinds: dict[int, Any], dims: int, options: dict[str, Any], **more: Any) -> Case:
    given = {"kernel_size": 3, "out": 6} | options
    out = given.pop("out")
    return around(lambda: kinds[dims](4, out, **given), *SHAPES[dims], **more)


def _of_size(kind: Callable[..., nn.Module], options: dict[str, Any], dims: int) -> Case:
    return around(lambda: kind(4, 6, **options), *SHAPES[dims])


CONVOLUTION = {
    **{f"conv{d}d, {name}": _conv(CONV, d, options) for d in (1, 2, 3) for name, options in CONV_OPTIONS.items()},
    **{
        f"conv_transpose{d}d, {name}": _conv(TRANSPOSED, d, options)
        for d in (1, 2, 3)
        for name, options in TRANSPOSED_OPTIONS.items()
    },
    **{name: _of_size(kind, options, 3 if "3d" in name else 2) for name, (kind, options) in NOT_SQUARE.items()},
    "conv2d, one row": _conv(CONV, 2, {}, rows=1),
    "conv2d, as many rows as channels and places": around(lambda: nn.Conv2d(4, 4, 1), 4, 2, 2, rows=4),
    "conv2d, the kernel covers the image": around(lambda: nn.Conv2d(4, 6, (7, 6)), 4, 7, 6),
    "conv2d, one channel": around(lambda: nn.Conv2d(1, 1, 3), 1, 7, 6),
    "conv2d, only its bias trained": around(only("bias", lambda: nn.Conv2d(4, 6, 3)), 4, 7, 6),
    "conv2d, only its weight trained": around(only("weight", lambda: nn.Conv2d(4, 6, 3)), 4, 7, 6),
    "conv2d with groups, only its weight trained": around(
        only("weight", lambda: nn.Conv2d(4, 6, 3, groups=2)), 4, 7, 6
    ),
    "conv_transpose2d, only its bias trained": around(only("bias", lambda: nn.ConvTranspose2d(4, 6, 3)), 4, 7, 6),
    "conv2d on channels-last input": _conv(
        CONV, 2, {}, arrange=lambda x: x.contiguous(memory_format=torch.channels_last)
    ),
    "conv2d with groups on channels-last input": _conv(
        CONV, 2, {"groups": 2}, arrange=lambda x: x.contiguous(memory_format=torch.channels_last)
    ),
    "conv3d on channels-last input": _conv(
        CONV, 3, {}, arrange=lambda x: x.contiguous(memory_format=torch.channels_last_3d)
    ),
    "conv2d on sliced input": _conv(CONV, 2, {}, arrange=lambda x: x.repeat(1, 2, 2, 1)[:, ::2, 1::2]),
    "conv2d in channels-last memory": Case(
        lambda: Around(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (4, 7, 6)), (4, 7, 6)
    ),
}

EMBEDDING = {
    "embedding": around(lambda: nn.Embedding(9, 4), 5, tokens=9),
    "embedding, tokens repeated": around(lambda: nn.Embedding(9, 4), 12, tokens=2),
    "embedding, padding": around(lambda: nn.Embedding(3, 4, padding_idx=1), 6, tokens=3),
    "embedding, padding counted from the end": around(lambda: nn.Embedding(3, 4, padding_idx=-1), 6, tokens=3),
    "embedding, one token a row": around(lambda: nn.Embedding(9, 4), tokens=9),
    "embedding, two leading dimensions": around(lambda: nn.Embedding(9, 4), 2, 3, tokens=9),
    "embedding, as many tokens as rows": around(lambda: nn.Embedding(9, 4), 3, tokens=9),
    "embedding, int32 tokens": around(
        lambda: nn.Embedding(3, 4, padding_idx=-1), 6, tokens=3, arrange=lambda x: x.int()
    ),
    "embedding of one": around(lambda: nn.Embedding(1, 1), 3, tokens=1),
}

NORMALISATION = {
    "layer norm": around(lambda: nn.LayerNorm(6), 6),
    "layer norm over positions": around(lambda: nn.LayerNorm(6), 4, 6),
    "layer norm over two dimensions": around(lambda: nn.LayerNorm((4, 6)), 4, 6),
    "layer norm over two of three dimensions": around(lambda: nn.LayerNorm((4, 6)), 5, 4, 6),
    "layer norm, as many positions as rows": around(lambda: nn.LayerNorm(6), 3, 6),
    "layer norm without bias": around(lambda: nn.LayerNorm(6, bias=False), 4, 6),
    "layer norm, only its bias trained": around(only("bias", lambda: nn.LayerNorm(6)), 4, 6),
    "layer norm, only its weight trained": around(only("weight", lambda: nn.LayerNorm(6)), 4, 6),
    "layer norm without parameters": net(
        lambda: {"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6, elementwise_affine=False)},
        lambda m, x: m.norm(m.fc(x)),
        4,
        6,
    ),
    "group norm": around(lambda: nn.GroupNorm(2, 6), 6, 5, 4),
    "group norm, one group": around(lambda: nn.GroupNorm(1, 6), 6, 5),
    "group norm, a group a channel": around(lambda: nn.GroupNorm(6, 6), 6, 5, 4),
    "group norm without positions": around(lambda: nn.GroupNorm(2, 6), 6),
    "group norm, only its bias trained": around(only("bias", lambda: nn.GroupNorm(2, 6)), 6, 5, 4),
    "rms norm": around(lambda: nn.RMSNorm(6), 4, 6),
    "rms norm with its own eps": around(lambda: nn.RMSNorm(6, eps=0.3), 4, 6),
    "rms norm over two dimensions": around(lambda: nn.RMSNorm((4, 6)), 4, 6),
    "batch norm 1d": around(lambda: nn.BatchNorm1d(6), 6),
    "batch norm 1d over positions": around(lambda: nn.BatchNorm1d(6), 6, 5),
    "batch norm 2d": around(lambda: nn.BatchNorm2d(6), 6, 5, 4),
    "batch norm 2d with a large eps": around(lambda: nn.BatchNorm2d(6, eps=0.5), 6, 5, 4),
    "batch norm 3d": around(lambda: nn.BatchNorm3d(2), 2, 3, 2, 2),
    "batch norm 2d, only its weight trained": around(only("weight", lambda: nn.BatchNorm2d(6)), 6, 5, 4),
    "batch norm 2d without parameters": net(
        lambda: {"conv": nn.Conv2d(4, 6, 1), "norm": nn.BatchNorm2d(6, affine=False)},
        lambda m, x: m.norm(m.conv(x)),
        4,
        5,
        4,
    ),
    "instance norm, only its bias trained": around(only("bias", lambda: nn.InstanceNorm2d(6, affine=True)), 6, 5, 4),
    "instance norm, only its weight trained": around(
        only("weight", lambda: nn.InstanceNorm2d(6, affine=True)), 6, 5, 4
    ),
    "instance norm": around(lambda: nn.InstanceNorm2d(6, affine=True), 6, 5, 4),
    "instance norm 1d": around(lambda: nn.InstanceNorm1d(6, affine=True), 6, 5),
    "instance norm with running statistics": around(
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), 6, 5, 4
    ),
}


class Attend(nn.Module):
    """nn.MultiheadAttention on rows (N, T, 6); keys and values of another length and width if ``cross``."""

    def __init__(
        self, *, mask: str = "", weights: bool = False, cross: bool = False, shared: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if cross and not shared:
            options |= {"kdim": 4, "vdim": 3}
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.4, **options)
        self.mask, self.weights, self.cross, self.shared = mask, weights, cross, shared

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x, x, x
        if self.cross:
            key, value = (x[:, :3], x[:, 1:4]) if self.shared else (x[:, :3, :4], x[:, :3, :3])
        given: dict[str, Any] = {"need_weights": self.weights}
        n, t, s = len(x), query.shape[1], key.shape[1]
        if "padding" in self.mask:
            padding = key[..., 0] > 0.5
            given["key_padding_mask"] = padding & (torch.arange(s, device=x.device) > 0)
        if "causal" in self.mask:
            given["attn_mask"] = torch.ones(t, s, dtype=torch.bool, device=x.device).triu(1)
        if "float" in self.mask:
            given["attn_mask"] = torch.arange(t * s, device=x.device).view(t, s).to(x.dtype).sin()
        if "by row" in self.mask:
            given["attn_mask"] = (x[:, :, None, 0] * x[:, None, :s, 1]).repeat_interleave(2, 0).view(n * 2, t, s).sin()
        if not self.attention.batch_first:
            query, key, value = (v.transpose(0, 1) for v in (query, key, value))
        out, attention = self.attention(query, key, value, **given)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out if attention is None else torch.cat([out, attention], 2)


def _attend(rows: int = 3, **options: Any) -> Case:
    return around(lambda: Attend(**options), 5, 6, rows=rows)


ATTENTION = {
    "attention": _attend(batch_first=True),
    "attention, sequence first": _attend(),
    "attention, weights returned": _attend(batch_first=True, weights=True),
    "attention, sequence first, weights returned": _attend(weights=True),
    "attention without bias": _attend(batch_first=True, bias=False),
    "attention, as many positions as rows": _attend(rows=5, batch_first=True),
    "attention, sequence first, as many positions as rows": _attend(rows=5),
    "attention, one row": _attend(rows=1, batch_first=True),
    "attention, sequence first, one row": _attend(rows=1),
    "attention, padding mask": _attend(batch_first=True, mask="padding"),
    "attention, sequence first, padding mask, weights returned": _attend(mask="padding", weights=True),
    "attention, causal mask": _attend(batch_first=True, mask="causal"),
    "attention, mask of numbers": _attend(mask="float"),
    "attention, a mask for every row": _attend(batch_first=True, mask="by row"),
    "attention, keys and values of their own": _attend(batch_first=True, cross=True, shared=True),
    "attention, widths of their own": _attend(batch_first=True, cross=True),
    "attention, widths of their own, sequence first": _attend(cross=True, weights=True),
    "attention, widths of their own, without bias": _attend(batch_first=True, cross=True, bias=False),
    "attention, bias as a key": _attend(batch_first=True, add_bias_kv=True),
    "attention, bias as a key, sequence first, weights": _attend(add_bias_kv=True, weights=True),
    "attention, zero as a key": _attend(batch_first=True, add_zero_attn=True),
    "attention, only its output projection trained": around(
        lambda: _only_in(Attend(batch_first=True), "out_proj"), 5, 6
    ),
    "attention, only its input projection trained": around(lambda: _only_in(Attend(), "in_proj"), 5, 6),
    "attention, only the keys' projection trained": around(
        lambda: _only_in(Attend(batch_first=True, cross=True), "k_proj"), 5, 6
    ),
    "attention, only biases trained": around(
        lambda: _only_in(Attend(batch_first=True), "bias"),
        5,
        6,
    ),
    **{
        f"encoder layer, norm first {norm}, batch first {batch}": around(
            lambda norm=norm, batch=batch: Encode(norm_first=norm, batch_first=batch), 5, 6
        )
        for norm in (True, False)
        for batch in (True, False)
    },
    "encoder layer without bias": around(lambda: Encode(norm_first=True, batch_first=True, bias=False), 5, 6),
    "encoder layer, gelu": around(lambda: Encode(norm_first=False, batch_first=True, activation="gelu"), 5, 6),
    "encoder layer, padding mask": around(lambda: Encode(norm_first=False, batch_first=True, padding=True), 5, 6),
    "decoder layer": around(lambda: Decode(batch_first=True), 5, 6),
    "decoder layer, sequence first": around(lambda: Decode(batch_first=False), 5, 6),
}


def _only_in(module: nn.Module, part: str) -> nn.Module:
    for name, p in module.named_parameters():
        p.requires_grad_(part in name)
    return module


class Encode(nn.Module):
    """nn.TransformerEncoderLayer on rows (N, T, 6)."""

    def __init__(self, padding: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 9, dropout=0.3, **options)
        self.batch_first, self.padding = options["batch_first"], padding

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[..., 0] > 0.5) & (torch.arange(x.shape[1], device=x.device) > 0) if self.padding else None
        if self.batch_first:
            return self.layer(x, src_key_padding_mask=mask)
        return self.layer(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1)


class Decode(nn.Module):
    """nn.TransformerDecoderLayer on rows (N, T, 6), with part of the row as memory."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(6, 2, 9, dropout=0.3, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.layer(x, x[:, :2].sin())
        x = x.transpose(0, 1)
        return self.layer(x, x[:2].sin()).transpose(0, 1)


class Bags(nn.Module):
    """Each row's six tokens in three bags, of two tokens, of none and of four, told by offsets."""

    def __init__(self, major: bool = True, **options: Any) -> None:
        super().__init__()
        self.major, self.table = major, nn.EmbeddingBag(5, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        bags = [x[:, :2], x[:, :0], x[:, 2:]]
        if self.major:  # a row's bags one after the other; otherwise all rows' first bags come first
            tokens, lengths = x.flatten(), torch.tensor([2, 0, 4], device=x.device).repeat(len(x))
        else:
            tokens = torch.cat([bag.flatten() for bag in bags])
            lengths = torch.tensor([2, 0, 4], device=x.device).repeat_interleave(len(x))
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends]) if self.table.include_last_offset else ends - lengths
        h = self.table(tokens, offsets)
        return h.view(len(x), 3, 4) if self.major else h.view(3, len(x), 4).transpose(0, 1)


class WeightedBag(nn.Module):
    """A bag whose weights are learned, by token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weights = nn.EmbeddingBag(5, 4, mode="sum", padding_idx=2), nn.Embedding(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x, per_sample_weights=self.weights(x).squeeze(-1).sin())


def _padded(x: Tensor) -> Tensor:
    """The first row holds padding alone."""
    x = x.clone()
    x[0] = 1
    return x


BAG = {
    "bag of embeddings, mean": around(lambda: nn.EmbeddingBag(9, 4), 5, tokens=9),
    "bag of embeddings, sum, tokens repeated": around(lambda: nn.EmbeddingBag(9, 4, mode="sum"), 12, tokens=2),
    "bag of embeddings, one token": around(lambda: nn.EmbeddingBag(9, 4), 1, tokens=9),
    **{
        f"bag of embeddings, {mode}, padding {index}": around(
            lambda mode=mode, index=index: nn.EmbeddingBag(3, 4, mode=mode, padding_idx=index),
            6,
            tokens=3,
            arrange=_padded,
        )
        for mode, index in (("sum", 1), ("mean", 1), ("mean", -2))
    },
    "bags by offsets": around(lambda: Bags(mode="sum"), 6, tokens=5),
    "bags by offsets, mean, padding": around(lambda: Bags(mode="mean", padding_idx=3), 6, tokens=5),
    "bags by offsets and the last": around(lambda: Bags(mode="mean", include_last_offset=True), 6, tokens=5),
    "bags by offsets, sequence first": around(lambda: Bags(major=False, mode="sum"), 6, tokens=5),
    "bag with weights that are learned": around(WeightedBag, 7, tokens=5),
}

PARAMETRIC = {
    "prelu": around(lambda: nn.PReLU(), 4, 6),
    "prelu of vectors": around(lambda: nn.PReLU(6), 6),
    "prelu, one a channel": around(lambda: nn.PReLU(4), 4, 5, 3),
    "prelu, as many channels as rows": around(lambda: nn.PReLU(3), 3, 6),
    "bilinear": around(lambda: Twice(nn.Bilinear(6, 4, 5)), 6),
    "bilinear over positions, without bias": around(lambda: Twice(nn.Bilinear(6, 4, 5, bias=False)), 3, 6),
    "bilinear, as many positions as rows": around(lambda: Twice(nn.Bilinear(6, 4, 3)), 3, 6),
}


class Twice(nn.Module):
    """A bilinear layer of the row and of a part of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., :4].sin())


LAYERS = {**LINEAR, **CONVOLUTION, **EMBEDDING, **BAG, **PARAMETRIC, **NORMALISATION, **ATTENTION}
"""One layer each; all of it served by rules."""


# --------------------------------------------------------------------------------------------- ways of using parameters


def _token(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"token": torch.randn(shape)}


def _linear(i: int = 6, o: int = 6, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"fc": nn.Linear(i, o, **options)}


def _weight(o: int = 7, i: int = 6, bias: bool = False) -> Callable[[], dict[str, Any]]:
    return lambda: {"w": torch.randn(o, i)} | ({"b": torch.randn(o)} if bias else {})


def _windows(m: Any, x: Tensor) -> Tensor:
    """Rows (N, 4, 4, d) cut into four windows each, merged into the batch, as shifted-window attention does."""
    n, _, _, d = x.shape
    windows = x.view(n, 2, 2, 2, 2, d).transpose(2, 3).reshape(n * 4, 4, d)
    return m.fc(windows).reshape(n, -1)


def _in_place(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    h.relu_()
    h = m.conv(h)
    h[:, 0] = 0
    return h.mul_(2)


def _sdpa(m: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


def _scores(m: Any, x: Tensor) -> Tensor:
    """Attention written out, with a mask that depends on the row."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill((x[:, None, :, 0] > 1.0), -1e4)
    return m.proj(scores.softmax(-1) @ v)


def _three(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(m.fc(torch.relu(m.fc(x)))))


def _tied(bias: bool) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=bias)
        head.weight = embedding.weight
        return {"embedding": embedding, "head": head}

    return make


@dataclass
class Answer:
    """What a Hugging Face model returns: logits among other things."""

    logits: Tensor
    hidden_states: tuple = ()


def _norm_parameters() -> dict[str, Any]:
    return {"w": torch.randn(6), "b": torch.randn(6)}


def _einsum(equation: str, weight: tuple[int, ...], *shape: int, **more: Any) -> Case:
    """x (N, *shape) contracted with a parameter, which stands first where the equation has it first."""
    first = equation.split(",")[0].startswith("W")
    equation = equation.replace("W", "")
    operands = (lambda m, x: (m.w, x)) if first else (lambda m, x: (x, m.w))
    return net(_tensor(*weight), lambda m, x: torch.einsum(equation, *operands(m, x)), *shape, **more)


def _tensor(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"w": torch.randn(shape) / 2}


CONTRACTIONS = {
    "einsum": _einsum("ntd,cd->ntc", (7, 6), 4, 6),
    "einsum, transposed": _einsum("ntd,dc->ntc", (6, 7), 4, 6),
    "einsum, the weight first": _einsum("Wcd,ntd->nct", (7, 6), 4, 6),
    "einsum without an arrow": _einsum("ntx,xz", (6, 7), 4, 6),
    "einsum with an ellipsis": _einsum("...d,cd->...c", (7, 6), 3, 2, 6),
    "einsum with an ellipsis and without an arrow": _einsum("...x,xz", (6, 7), 4, 6),
    "einsum with blanks": _einsum("n t d , c d -> n t c", (7, 6), 4, 6),
    "einsum into heads": _einsum("ntd,dhk->nhtk", (6, 2, 3), 4, 6),
    "einsum into heads, heads first": _einsum("ntd,hdk->nhtk", (2, 6, 3), 4, 6),
    "einsum out of heads": _einsum("nthk,hkd->ntd", (2, 3, 5), 4, 2, 3),
    "einsum, a matrix for each group": _einsum("ngd,gdc->ngc", (4, 6, 5), 4, 6),
    "einsum, as many groups as rows": _einsum("ngd,gdc->ngc", (3, 6, 5), 3, 6),
    "einsum, a scale for each entry": _einsum("ntd,td->ntd", (4, 6), 4, 6),
    "einsum with a vector": _einsum("ntd,d->nt", (6,), 4, 6),
    "einsum over positions": _einsum("ntd,st->nsd", (5, 4), 4, 6),
    "einsum over positions and features": _einsum("ntd,tdc->nc", (4, 6, 5), 4, 6),
    "einsum to a number": net(_tensor(4, 6), lambda m, x: torch.einsum("ntd,td->n", x, m.w)[:, None], 4, 6),
    "a vector on the right of vectors": net(_tensor(6), lambda m, x: (x @ m.w)[:, None], 6),
    "a number for a row, scaled": net(_tensor(1), lambda m, x: (x.sum(1) * m.w)[:, None], 6),
    "einsum of an outer product": _einsum("nt,c->ntc", (5,), 4),
    "einsum, sequence first": net(
        _weight(), lambda m, x: torch.einsum("tnd,cd->tnc", x.transpose(0, 1), m.w).transpose(0, 1), 4, 6
    ),
    "einsum, positions merged": net(
        _weight(), lambda m, x: torch.einsum("bd,cd->bc", x.reshape(-1, 6), m.w).view(-1, 4, 7), 4, 6
    ),
    "einsum, positions merged, a matrix for each group": net(
        _tensor(2, 3, 5), lambda m, x: torch.einsum("bgd,gdc->bgc", x.reshape(-1, 2, 3), m.w).reshape(-1, 4, 10), 4, 6
    ),
    "einsum, sequence first, merged, a matrix for each group": net(
        _tensor(2, 3, 5),
        lambda m, x: (
            torch.einsum("bgd,gdc->bgc", x.transpose(0, 1).reshape(-1, 2, 3), m.w).reshape(4, -1, 10).transpose(0, 1)
        ),
        4,
        6,
    ),
    "einsum with the transpose": net(_weight(), lambda m, x: torch.einsum("ntd,dc->ntc", x, m.w.T), 4, 6),
    "einsum with a weight cut into heads": net(
        _weight(6), lambda m, x: torch.einsum("ntd,hkd->nthk", x, m.w.view(2, 3, 6)), 4, 6
    ),
    "einsum out of heads, with a weight cut into them": net(
        _weight(6, 5), lambda m, x: torch.einsum("nthk,hkd->ntd", x.unflatten(-1, (2, 3)), m.w.view(2, 3, 5)), 4, 6
    ),
    "einsum twice with one weight": net(
        _weight(6), lambda m, x: torch.einsum("ntd,cd->ntc", torch.einsum("ntd,cd->ntc", x, m.w).sin(), m.w), 4, 6
    ),
    "one weight in a linear layer and in an einsum": net(
        _weight(6), lambda m, x: F.linear(torch.einsum("ntd,cd->ntc", x, m.w).sin(), m.w), 4, 6
    ),
    "a weight on the left": net(_weight(7, 4), lambda m, x: m.w @ x, 4, 6),
    "a weight's transpose on the left": net(_weight(4, 7), lambda m, x: m.w.T.matmul(x), 4, 6),
    "a vector on the right": net(_tensor(6), lambda m, x: x @ m.w, 4, 6),
    "a matrix for each head": net(_tensor(2, 6, 5), lambda m, x: x @ m.w, 2, 3, 6),
    "a matrix for each head on the left": net(_tensor(2, 5, 3), lambda m, x: torch.matmul(m.w, x), 2, 3, 6),
    "a matrix for each position, bmm": net(
        _tensor(4, 6, 5), lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), 4, 6
    ),
    "a matrix for each position, bmm on the left": net(
        _tensor(4, 5, 6), lambda m, x: m.w.bmm(x.permute(1, 2, 0)).permute(2, 0, 1), 4, 6
    ),
}

INDEXED = {
    "indexed by tokens": net(_tensor(9, 4), lambda m, x: m.w[x], 5, tokens=9),
    "indexed by tokens repeated": net(_tensor(9, 4), lambda m, x: m.w[x], 12, tokens=2),
    "indexed from the end": net(_tensor(9, 4), lambda m, x: m.w[x - 9], 5, tokens=9),
    "indexed by int32": net(_tensor(9, 4), lambda m, x: m.w[x.int()], 5, tokens=9),
    "indexed by a tuple": net(_tensor(9, 4), lambda m, x: m.w[(x,)], 5, tokens=9),
    "a number for each token": net(_tensor(9), lambda m, x: m.w[x], 5, tokens=9),
    "a matrix for each token": net(_tensor(9, 2, 3), lambda m, x: m.w[x], 5, tokens=9),
    "one token a row": net(_tensor(9, 4), lambda m, x: m.w[x], tokens=9),
    "some rows indexed": net(_tensor(9, 4), lambda m, x: m.w[3:7][x], 5, tokens=4),
    "rows selected": net(_tensor(9, 4), lambda m, x: m.w.index_select(0, x.flatten()).view(-1, 5, 4), 5, tokens=9),
    "rows selected, sequence first": net(
        _tensor(9, 4),
        lambda m, x: torch.index_select(m.w, 0, x.T.flatten()).view(5, -1, 4).transpose(0, 1),
        5,
        tokens=9,
    ),
    "positions indexed": net(_tensor(7, 6), lambda m, x: x + m.w[torch.arange(4, device=x.device)], 4, 6),
    "indexed and tied to the classifier": net(_tensor(9, 6), lambda m, x: F.linear(m.w[x].sin(), m.w), 5, tokens=9),
}

USES = {
    **CONTRACTIONS,
    **INDEXED,
    # Raw parameters.
    "class token, expanded": net(_token(1, 1, 6), lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), 4, 6),
    "class token, repeated": net(_token(1, 1, 6), lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1), 4, 6),
    "class token, as many positions as rows": net(
        _token(1, 1, 6), lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), 2, 6, rows=3
    ),
    "class token of one dimension": net(_token(6), lambda m, x: torch.cat([m.token.expand(len(x), 1, 6), x], 1), 4, 6),
    "class token, one row": net(
        _token(1, 1, 6), lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), 4, 6, rows=1
    ),
    "position embedding": net(_token(1, 4, 6), lambda m, x: x + m.token, 4, 6),
    "position embedding on the left": net(_token(1, 4, 6), lambda m, x: m.token + x, 4, 6),
    "position embedding of two dimensions": net(_token(4, 6), lambda m, x: x + m.token, 4, 6),
    "position embedding, as many positions as rows": net(_token(4, 6), lambda m, x: x + m.token, 4, 6, rows=4),
    "position embedding, sequence first": net(
        _token(4, 1, 6), lambda m, x: (x.transpose(0, 1) + m.token).transpose(0, 1), 4, 6
    ),
    "position embedding, sequence first, as many positions as rows": net(
        _token(4, 1, 6), lambda m, x: (x.transpose(0, 1) + m.token).transpose(0, 1), 4, 6, rows=4
    ),
    "position embedding, subtracted": net(_token(1, 4, 6), lambda m, x: x - m.token, 4, 6),
    "position embedding, added in place": net(_token(1, 4, 6), lambda m, x: torch.sin(x).add_(m.token), 4, 6),
    "bias of channels": net(_token(4, 1, 1), lambda m, x: x + m.token, 4, 3, 2),
    "layer scale": net(_token(6), lambda m, x: x * m.token, 4, 6),
    "layer scale on the left": net(_token(6), lambda m, x: m.token * x, 4, 6),
    "layer scale, all sizes the same": net(_token(4), lambda m, x: x * m.token, 4, 4, rows=4),
    "layer scale of channels": net(_token(4, 1, 1), lambda m, x: x * m.token, 4, 3, 2),
    "layer scale without positions": net(_token(6), lambda m, x: x * m.token, 6),
    "layer scale, one number": net(_token(1), lambda m, x: x * m.token, 4, 6),
    "layer scale used twice": net(_token(6), lambda m, x: torch.sin(x * m.token) * m.token, 4, 6),
    "token, added and multiplied": net(_token(6), lambda m, x: torch.sin(x * m.token) + m.token, 4, 6),
    # Modules used more than once, and parameters shared by modules.
    "linear used three times": net(_linear(), _three, 4, 6),
    "linear used on two lengths": net(_linear(), lambda m, x: torch.cat([m.fc(x), m.fc(x[:, :2].sin())], 1), 4, 6),
    "linear used with and without positions": net(
        _linear(), lambda m, x: torch.cat([m.fc(x), m.fc(x.mean(1).sin())[:, None]], 1), 4, 6
    ),
    "linear used with and without positions, as many as rows": net(
        _linear(), lambda m, x: torch.cat([m.fc(x), m.fc(x.mean(1).sin())[:, None]], 1), 3, 6
    ),
    "convolution used twice": net(
        lambda: {"conv": nn.Conv2d(4, 4, 3, padding=1)}, lambda m, x: m.conv(torch.relu(m.conv(x))), 4, 5, 4
    ),
    "convolution used on two sizes": net(
        lambda: {"conv": nn.Conv2d(4, 4, 3, padding=1)},
        lambda m, x: torch.cat([m.conv(x).flatten(1), m.conv(x[:, :, :3, ::2].sin()).flatten(1)], 1),
        4,
        5,
        4,
    ),
    "layer norm used twice": net(
        lambda: {"norm": nn.LayerNorm(6)}, lambda m, x: m.norm(x + torch.sin(m.norm(x))), 4, 6
    ),
    "batch norm used twice": net(
        lambda: {"norm": nn.BatchNorm2d(4)}, lambda m, x: m.norm(torch.sin(m.norm(x))), 4, 3, 2
    ),
    "embedding used twice": net(
        lambda: {"embedding": nn.Embedding(9, 4)},
        lambda m, x: m.embedding(x) * m.embedding(x.flip(1)),
        5,
        tokens=9,
    ),
    "attention used twice": net(
        lambda: {"attend": Attend(batch_first=True)}, lambda m, x: m.attend(x + m.attend(x)), 5, 6
    ),
    "one module under two names": net(
        lambda: (lambda fc: {"first": fc, "second": fc})(nn.Linear(6, 6)),
        lambda m, x: m.second(torch.relu(m.first(x))),
        4,
        6,
    ),
    "weight shared, biases of their own": net(
        lambda: _shared_weight(), lambda m, x: m.second(torch.relu(m.first(x))), 4, 6
    ),
    "bias added once more": net(_linear(), lambda m, x: torch.sin(m.fc(x)) + m.fc.bias, 4, 6),
    "bias shared by two layers": net(lambda: _shared_bias(), lambda m, x: m.second(torch.relu(m.first(x))), 4, 6),
    "bias used without its weight": net(
        lambda: {"fc": nn.Linear(6, 6), "free": nn.Linear(6, 6, bias=False)},
        lambda m, x: torch.sin(m.fc(x)) + F.linear(x, m.free.weight, m.fc.bias),
        4,
        6,
    ),
    "embedding tied to the classifier": logits(
        _tied(bias=True), lambda m, x: m.head(m.embedding(x).mean(1).tanh()), 5, tokens=9, classes=9
    ),
    "embedding tied to the classifier, without bias": logits(
        _tied(bias=False), lambda m, x: m.head(m.embedding(x).mean(1).tanh()), 5, tokens=9, classes=9
    ),
    "embedding tied by a functional call": logits(
        lambda: {"embedding": nn.Embedding(9, 6)},
        lambda m, x: F.linear(m.embedding(x).mean(1).tanh(), m.embedding.weight),
        5,
        tokens=9,
        classes=9,
    ),
    # Functional calls.
    "called by keyword": net(_linear(), lambda m, x: m.fc(input=x), 4, 6),
    "F.linear": net(_weight(), lambda m, x: F.linear(x, m.w), 4, 6),
    "F.linear with bias": net(_weight(bias=True), lambda m, x: F.linear(x, m.w, m.b), 4, 6),
    "x @ w.t()": net(_weight(), lambda m, x: x @ m.w.t(), 6),
    "x @ w.t() over positions": net(_weight(), lambda m, x: x @ m.w.t(), 4, 6),
    "x @ w.T + b": net(_weight(bias=True), lambda m, x: x @ m.w.T + m.b, 4, 6),
    "x @ w": net(_weight(6, 7), lambda m, x: x @ m.w, 4, 6),
    "x @ w, square, as many positions as rows": net(_weight(4, 4), lambda m, x: x @ m.w, 4, 4, rows=4),
    "torch.addmm": net(_weight(bias=True), lambda m, x: torch.addmm(m.b, x, m.w.t()), 6),
    "F.conv2d": net(
        lambda: {"w": torch.randn(6, 2, 3, 2), "b": torch.randn(6)},
        lambda m, x: F.conv2d(x, m.w, m.b, stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        4,
        7,
        6,
    ),
    "F.embedding": net(lambda: {"w": torch.randn(9, 4)}, lambda m, x: F.embedding(x, m.w, padding_idx=2), 5, tokens=9),
    "F.embedding, padding counted from the end": net(
        lambda: {"w": torch.randn(3, 4)}, lambda m, x: F.embedding(x, m.w, padding_idx=-2), 5, tokens=3
    ),
    "F.layer_norm": net(_norm_parameters, lambda m, x: F.layer_norm(x, (6,), m.w, m.b), 4, 6),
    "F.layer_norm without bias": net(lambda: {"w": torch.randn(6)}, lambda m, x: F.layer_norm(x, (6,), m.w), 4, 6),
    # Layouts.
    "sequence first": net(_linear(6, 7), lambda m, x: m.fc(x.transpose(0, 1)).transpose(0, 1), 4, 6),
    "sequence first, contiguous": net(
        _linear(6, 7), lambda m, x: m.fc(x.transpose(0, 1).contiguous()).transpose(0, 1), 4, 6
    ),
    "sequence first, as many positions as rows": net(
        _linear(6, 7), lambda m, x: m.fc(x.transpose(0, 1).contiguous()).transpose(0, 1), 4, 6, rows=4
    ),
    "sequence first, one row": net(
        _linear(6, 7), lambda m, x: m.fc(x.transpose(0, 1).contiguous()).transpose(0, 1), 4, 6, rows=1
    ),
    "sequence first, one position": net(
        _linear(6, 7), lambda m, x: m.fc(x.transpose(0, 1).contiguous()).transpose(0, 1), 1, 6
    ),
    "sequence first, layer norm": net(
        lambda: {"norm": nn.LayerNorm(6)}, lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1), 4, 6
    ),
    "sequence first, embedding": net(
        lambda: {"embedding": nn.Embedding(9, 4)}, lambda m, x: m.embedding(x.t()).transpose(0, 1), 5, tokens=9
    ),
    "positions merged with rows": net(_linear(6, 7), lambda m, x: m.fc(x.reshape(-1, 6)).view(len(x), 4, 7), 4, 6),
    "positions merged with rows, as many as rows": net(
        _linear(6, 7), lambda m, x: m.fc(x.reshape(-1, 6)).view(len(x), 4, 7), 4, 6, rows=4
    ),
    "positions merged with rows, in a convolution": net(
        lambda: {"conv": nn.Conv2d(2, 3, 3)}, lambda m, x: m.conv(x.flatten(0, 1)).view(len(x), -1), 4, 2, 5, 4
    ),
    "positions merged with rows, in a layer norm": net(
        lambda: {"norm": nn.LayerNorm(6)}, lambda m, x: m.norm(x.reshape(-1, 6)).view(len(x), 4, 6), 4, 6
    ),
    "windows merged with rows": net(_linear(6, 7), _windows, 4, 4, 6),
    "channels last inside": net(
        lambda: {"conv": nn.Conv2d(4, 6, 3), "norm": nn.LayerNorm(6), "fc": nn.Linear(6, 5)},
        lambda m, x: m.fc(m.norm(m.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
        4,
        5,
        6,
    ),
    # What happens around a layer.
    "changed in place afterwards": net(lambda: {"fc": nn.Linear(6, 6), "conv": nn.Conv1d(4, 4, 3)}, _in_place, 4, 6),
    "adapter of low rank": net(
        lambda: {
            "fc": nn.Linear(6, 7).requires_grad_(False),
            "down": nn.Linear(6, 2, bias=False),
            "up": nn.Linear(2, 7, bias=False),
        },
        lambda m, x: m.fc(x) + 2 * m.up(m.down(x)),
        4,
        6,
    ),
    "gated": net(
        lambda: {"fc": nn.Linear(6, 10), "out": nn.Linear(5, 6)},
        lambda m, x: m.out((lambda a, b: a * F.silu(b))(*m.fc(x).chunk(2, -1))),
        4,
        6,
    ),
    "squeezed and excited": net(
        lambda: {"conv": nn.Conv2d(4, 4, 3, padding=1), "fc": nn.Linear(4, 4)},
        lambda m, x: (lambda h: h * m.fc(h.mean((2, 3))).sigmoid()[:, :, None, None])(m.conv(x)),
        4,
        5,
        4,
    ),
    "output cut into parts": net(
        _linear(6, 9), lambda m, x: torch.cat([c * (k + 1) for k, c in enumerate(m.fc(x).chunk(3, -1))], -1).sin(), 4, 6
    ),
    "output used twice": net(_linear(), lambda m, x: (lambda h: h * h.flip(-1))(m.fc(x)), 4, 6),
    "part of the output used": net(_linear(), lambda m, x: m.fc(x)[:, :1], 4, 6),
    "output of one layer unused": net(
        lambda: {"fc": nn.Linear(6, 6), "idle": nn.Linear(6, 6)}, lambda m, x: (m.idle(x), m.fc(x))[1], 4, 6
    ),
    "a layer never called": net(lambda: {"fc": nn.Linear(6, 6), "idle": nn.Linear(6, 6)}, lambda m, x: m.fc(x), 4, 6),
    "a branch cut off": net(
        lambda: {"fc": nn.Linear(6, 6), "cut": nn.Linear(6, 6)}, lambda m, x: m.fc(x) + m.cut(x).detach(), 4, 6
    ),
    "a part without autograd": net(
        lambda: {"cut": nn.Linear(6, 6), "fc": nn.Linear(6, 6)},
        lambda m, x: m.fc(torch.no_grad()(m.cut)(x)),
        4,
        6,
    ),
    # Looked up or computed once for all rows, and broadcast over them.
    **{
        f"positions looked up once, {t} of them": net(
            lambda: {"fc": nn.Linear(6, 6), "embedding": nn.Embedding(9, 6)},
            lambda m, x: m.fc(x + m.embedding(torch.arange(x.shape[1], device=x.device))).sin(),
            t,
            6,
            rows=rows,
        )
        for t, rows in ((4, 6), (5, 5), (3, 4), (1, 3))
    },
    "positions looked up once, in an axis of their own": net(
        lambda: {"fc": nn.Linear(6, 6), "embedding": nn.Embedding(9, 6)},
        lambda m, x: m.fc(x + m.embedding(torch.arange(x.shape[1], device=x.device)[None])).sin(),
        4,
        6,
    ),
    "positions looked up once, before a layer norm": net(
        lambda: {"norm": nn.LayerNorm(6), "embedding": nn.Embedding(9, 6)},
        lambda m, x: m.norm(x * 0.5 + m.norm(m.embedding(torch.arange(x.shape[1], device=x.device)))),
        4,
        6,
    ),
    "positions from a network of their own": net(
        lambda: {"first": nn.Linear(1, 5), "second": nn.Linear(5, 6)},
        lambda m, x: x * m.second(m.first(torch.arange(1.0, 1 + x.shape[1]).to(x)[:, None]).tanh()),
        4,
        6,
    ),
    "tokens and positions": net(
        lambda: {"tokens": nn.Embedding(7, 6), "places": nn.Embedding(9, 6), "fc": nn.Linear(6, 6)},
        lambda m, x: m.fc((m.tokens(x) + m.places(torch.arange(x.shape[1], device=x.device))).tanh()),
        4,
        tokens=7,
    ),
    "residual": net(
        lambda: {"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}, lambda m, x: x + m.fc(torch.relu(m.norm(x))), 4, 6
    ),
    "dropout": net(lambda: {"fc": nn.Linear(6, 6), "drop": nn.Dropout(0.5)}, lambda m, x: m.drop(m.fc(x)), 4, 6),
    "scaled dot products": net(lambda: {"qkv": nn.Linear(6, 18), "proj": nn.Linear(6, 6)}, _sdpa, 5, 6),
    "scaled dot products, as many positions as rows": net(
        lambda: {"qkv": nn.Linear(6, 18, bias=False), "proj": nn.Linear(6, 6)}, _sdpa, 5, 6, rows=5
    ),
    "attention written out": net(lambda: {k: nn.Linear(6, 6) for k in ("q", "k", "v", "proj")}, _scores, 5, 6),
    "object with logits": logits(lambda: {"fc": nn.Linear(6, 4)}, lambda m, x: Answer(m.fc(x.flatten(1))), 6),
    "soft labels": logits(lambda: {"fc": nn.Linear(6, 4)}, lambda m, x: m.fc(x), 6, soft=True),
    "two classes": logits(lambda: {"fc": nn.Linear(6, 2)}, lambda m, x: m.fc(x), 6, classes=2),
    "one class": logits(lambda: {"fc": nn.Linear(6, 1)}, lambda m, x: m.fc(x), 6, classes=1),
    "parameters in a list": net(
        lambda: {"scales": nn.ParameterList([torch.randn(6), torch.randn(6)])},
        lambda m, x: torch.sin(x * m.scales[0]) * m.scales[1],
        4,
        6,
    ),
    "lower layers frozen": net(
        lambda: {"low": nn.Linear(6, 6).requires_grad_(False), "high": nn.Linear(6, 6)},
        lambda m, x: m.high(torch.relu(m.low(x))),
        4,
        6,
    ),
    "upper layers frozen": net(
        lambda: {"low": nn.Linear(6, 6), "high": nn.Linear(6, 6).requires_grad_(False)},
        lambda m, x: m.high(torch.relu(m.low(x))),
        4,
        6,
    ),
}
"""Networks whose every parameter is served by a rule, used in ways that hooks are known to get wrong."""


def _shared_bias() -> dict[str, Any]:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.bias = first.bias
    return {"first": first, "second": second}


def _shared_weight() -> dict[str, Any]:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return {"first": first, "second": second}


# ----------------------------------------------------------------------------------- where hooks give a wrong answer


class Double(torch.autograd.Function):
    """w x, by an autograd function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d * w, (d * x).sum(tuple(range(d.ndim - 1)))


def _by_length(m: Any, x: Tensor) -> Tensor:
    """Rows sorted by their content on the way in and back on the way out, as packed sequences are."""
    order = x[:, 0, 0].argsort()
    return m.fc(x[order])[order.argsort()]


def _routed(m: Any, x: Tensor) -> Tensor:
    """The tokens that a router picks, from all rows together, through one expert; the others unchanged."""
    flat = x.reshape(-1, x.shape[-1])
    chosen = flat[:, 0] > 0
    out = flat.clone()
    out[chosen] = m.fc(flat[chosen])
    return out.view_as(x)


def _even_at_first(x: Tensor) -> Tensor:
    """Two tokens of each of the first six rows are routed, then one and three in turn: two a row on average."""
    x = x.clone()
    x[:, :, 0] = -x[:, :, 0].abs()
    for n, row in enumerate(x):
        row[: 2 if n < 6 else 1 + 2 * (n % 2), 0] *= -1
    return x


def _looped(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.fc(row) for row in x])


def _views(m: Any, x: Tensor) -> Tensor:
    """Two views of every row, stacked along the batch: all first views, then all second ones."""
    a, b = m.fc(torch.cat([x, x.cos()])).chunk(2)
    return a * b


def _table() -> dict[str, Any]:
    return {"qkv": nn.Linear(6, 18), "table": torch.randn(9, 2)}


def _relative(m: Any, x: Tensor) -> Tensor:
    """Attention with a learnt table of relative positions added to its scores."""
    n, t, d = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
    index = torch.arange(t, device=x.device)[:, None] - torch.arange(t, device=x.device) + t - 1
    scores = q @ k.transpose(-2, -1) + m.table[index].permute(2, 0, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)


def _positions(m: Any, x: Tensor) -> Tensor:
    return x + m.embedding(torch.arange(x.shape[1], device=x.device))


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.last(checkpoint(lambda h: m.fc(torch.relu(m.fc(h))), m.first(x), use_reentrant=False))


def _three_linears() -> dict[str, Any]:
    return {"first": nn.Linear(6, 6), "fc": nn.Linear(6, 6), "last": nn.Linear(6, 6)}


def _hooked() -> dict[str, Any]:
    """A layer with a forward hook of the user's."""
    fc = nn.Linear(6, 6)
    fc.register_forward_hook(lambda _module, _inputs, output: output.sin())
    return {"fc": fc}


TRAPS = {
    "rows turned round": net(_linear(), lambda m, x: m.fc(x.flip(0)).flip(0), 4, 6),
    "rows turned round, five": net(_linear(), lambda m, x: m.fc(x.flip(0)).flip(0), 4, 6, rows=5),
    "rows moved on by one": net(_linear(), lambda m, x: m.fc(x.roll(1, 0)).roll(-1, 0), 4, 6),
    "first two rows swapped": net(_linear(), lambda m, x: (lambda p: m.fc(x[p])[p])(_swapped(len(x), 0, 1)), 4, 6),
    "last two rows swapped": net(_linear(), lambda m, x: (lambda p: m.fc(x[p])[p])(_swapped(len(x), -1, -2)), 4, 6),
    "rows sorted": net(_linear(), _by_length, 4, 6, rows=6),
    "rows sorted, the first ones in order": net(
        _linear(), _by_length, 4, 6, rows=9, arrange=lambda x: torch.cat([x[x[:6, 0, 0].argsort()], x[6:]])
    ),
    "tokens routed, as many of each of the first rows": net(_linear(), _routed, 4, 6, rows=10, arrange=_even_at_first),
    "tokens routed": net(_linear(), _routed, 4, 6, rows=6),
    "row by row": net(_linear(), _looped, 4, 6),
    "row by row, as many positions as rows": net(_linear(), _looped, 3, 6),
    "two views along the batch": net(_linear(), _views, 4, 6),
    "two views along the batch, without positions": net(_linear(), _views, 6, rows=4),
    "sequence first, merged": net(
        _linear(), lambda m, x: m.fc(x.transpose(0, 1).reshape(-1, 6)).view(4, -1, 6).transpose(0, 1), 4, 6
    ),
    "sequence first, merged, as many positions as rows": net(
        _linear(), lambda m, x: m.fc(x.transpose(0, 1).reshape(-1, 6)).view(4, -1, 6).transpose(0, 1), 4, 6, rows=4
    ),
    "a layer fed by no row": net(_linear(), lambda m, x: x * m.fc(torch.ones(4, 6).to(x).cumsum(0).sin()), 4, 6),
    "a layer fed by no row, as many positions as rows": net(
        _linear(), lambda m, x: x * m.fc(torch.ones(4, 6).to(x).cumsum(0).sin()), 4, 6, rows=4
    ),
    **{
        f"a layer fed by no row, {t} positions": net(
            _linear(), lambda m, x: x * m.fc(torch.ones(x.shape[1:]).to(x).cumsum(0).sin()), t, 6
        )
        for t in (3, 5, 15)
    },
    "a layer fed by no row, one for all": net(_linear(), lambda m, x: x * m.fc(torch.ones(1, 6).to(x)), 4, 6),
    "a token for every row, fed by no row": net(_linear(), lambda m, x: x * m.fc(torch.ones(len(x), 1, 6).to(x)), 4, 6),
    **{
        f"positions embedded, {t} of them": net(lambda t=t: {"embedding": nn.Embedding(t, 6)}, _positions, t, 6)
        for t in (3, 5, 15)
    },
    "a layer fed by the mean of the positions": net(_linear(), lambda m, x: x * m.fc(x.mean(1, keepdim=True)), 4, 6),
    "positions embedded": net(lambda: {"embedding": nn.Embedding(4, 6)}, _positions, 4, 6),
    "positions embedded, as many as rows": net(lambda: {"embedding": nn.Embedding(4, 6)}, _positions, 4, 6, rows=4),
    "positions embedded for every row": net(
        lambda: {"embedding": nn.Embedding(4, 6)},
        lambda m, x: x + m.embedding(torch.arange(4, device=x.device).expand(len(x), 4)),
        4,
        6,
    ),
    "relative positions": net(_table, _relative, 5, 6),
    "relative positions, as many as rows": net(_table, _relative, 5, 6, rows=5),
    "position embedding cut to length": net(_token(1, 9, 6), lambda m, x: x + m.token[:, : x.shape[1]], 4, 6),
    "position embedding of an image": net(
        _token(1, 4, 6), lambda m, x: x + m.token.reshape(1, 2, 2, 6).permute(0, 3, 1, 2).reshape(1, 6, 4).mT, 4, 6
    ),
    "some rows of a weight": net(_weight(), lambda m, x: F.linear(x, m.w[2:5]), 4, 6),
    "some columns of a weight": net(_weight(), lambda m, x: F.linear(x[..., :3], m.w[:, :3]), 4, 6),
    "some rows of a weight, transposed": net(_weight(), lambda m, x: x @ m.w[2:5].t(), 4, 6),
    "some rows of a transposed weight": net(_weight(6, 7), lambda m, x: F.linear(x, m.w.t()[2:5]), 4, 6),
    "some rows of a convolution's weight": net(
        lambda: {"w": torch.randn(6, 4, 2, 2), "b": torch.randn(6)},
        lambda m, x: F.conv2d(x, m.w[1:4], m.b[1:4]),
        4,
        5,
        4,
    ),
    "a convolution's weight cut in two": net(
        lambda: {"w": torch.randn(6, 4, 2, 2)},
        lambda m, x: F.conv2d(x, m.w.chunk(2)[0]) * F.conv2d(x, m.w.split(3)[1]) + F.conv2d(x, m.w.narrow(0, 2, 3)),
        4,
        5,
        4,
    ),
    "some rows of a grouped convolution's weight": net(
        lambda: {"w": torch.randn(6, 2, 2, 2)}, lambda m, x: F.conv2d(x, m.w[2:6], groups=2), 4, 5, 4
    ),
    "some rows of a transposed convolution's weight": net(
        lambda: {"w": torch.randn(6, 3, 2, 2)}, lambda m, x: F.conv_transpose2d(x, m.w[1:5]), 4, 5, 4
    ),
    "some rows of a table": net(
        lambda: {"w": torch.randn(9, 4)}, lambda m, x: F.embedding(x, m.w[3:7], padding_idx=1), 5, tokens=4
    ),
    "some entries of a bias": net(_weight(7, 6, True), lambda m, x: F.linear(x, m.w[2:5], m.b[1:4]), 4, 6),
    "some entries of a scale": net(_token(9), lambda m, x: x * m.token[2:8], 4, 6),
    "rows of a weight used twice, overlapping": net(
        _weight(), lambda m, x: F.linear(x, m.w[1:5]) * F.linear(x, m.w[3:7]), 4, 6
    ),
    "one weight cut in three": net(
        _weight(18),
        lambda m, x: (lambda q, k, v: F.linear(x, q) * F.linear(x, k) + F.linear(x, v))(*m.w.chunk(3)),
        4,
        6,
    ),
    "einsum, a diagonal": _einsum("ntt,t->nt", (4,), 4, 4),
    "einsum, an axis of the rows summed": _einsum("ntd,c->nc", (5,), 4, 6),
    "einsum, an axis of the weight summed": _einsum("ntd,cd->nt", (5, 6), 4, 6),
    "einsum, an axis of length 1": _einsum("ntd,td->ntd", (4, 1), 4, 6),
    "einsum, rows of length 1": _einsum("ntd,td->ntd", (4, 6), 4, 1),
    "einsum of three": net(_weight(), lambda m, x: torch.einsum("ntd,cd,ntd->ntc", x, m.w, x.sin()), 4, 6),
    "einsum with a weight turned round": net(
        lambda: {"w": torch.randn(2, 6, 3)}, lambda m, x: torch.einsum("ntd,hkd->nthk", x, m.w.mT), 4, 6
    ),
    "einsum with an expanded weight": net(
        lambda: {"w": torch.randn(1, 6)}, lambda m, x: torch.einsum("ntd,cd->ntc", x, m.w.expand(3, -1)), 4, 6
    ),
    "einsum with a part of a weight": net(_weight(), lambda m, x: torch.einsum("ntd,cd->ntc", x, m.w[2:5]), 4, 6),
    "einsum of a weight with itself": net(
        _weight(), lambda m, x: F.linear(x, torch.einsum("cd,ed->ce", m.w, m.w)[:, :6]), 4, 6
    ),
    "one matrix for all heads": net(lambda: {"w": torch.randn(1, 6, 5)}, lambda m, x: x @ m.w, 2, 3, 6),
    "columns looked up": net(lambda: {"w": torch.randn(4, 9)}, lambda m, x: F.embedding(x, m.w.T), 5, tokens=9),
    "columns looked up, a square": net(
        lambda: {"w": torch.randn(5, 5)}, lambda m, x: F.embedding(x, m.w.T), 5, tokens=5
    ),
    "normalised by a square's transpose": net(
        lambda: {"w": torch.randn(4, 4), "b": torch.randn(4, 4)},
        lambda m, x: F.layer_norm(x, (4, 4), m.w.T, m.b) + F.layer_norm(x, (4, 4), None, m.b.T),
        4,
        4,
    ),
    "normalised by a cube turned round": net(
        lambda: {"w": torch.randn(3, 3, 3)}, lambda m, x: F.layer_norm(x, (3, 3, 3), m.w.transpose(0, 1)), 3, 3, 3
    ),
    "a square's transpose": net(
        lambda: {"w": torch.randn(4, 4), "b": torch.randn(4, 4)}, lambda m, x: x * m.w.T + m.b.T, 4, 4
    ),
    **{
        f"a square in another order of memory, {name}": net(
            lambda: {"w": torch.randn(4, 4).T}, lambda m, x, use=use: use(m.w, x), 4, 4
        )
        for name, use in {
            "scaled": lambda w, x: x * w,
            "scaled by its transpose": lambda w, x: x * w.T,
            "scaled by a row": lambda w, x: x * w[1],
            "added by a column": lambda w, x: x + w[:, 1],
            "linear": lambda w, x: F.linear(x, w),
            "linear, transposed": lambda w, x: F.linear(x, w.T),
            "linear, some rows": lambda w, x: F.linear(x, w[1:3]),
            "on the left": lambda w, x: w @ x,
            "on the left, transposed": lambda w, x: w.T @ x,
            "contracted": lambda w, x: torch.einsum("ntd,dc->ntc", x, w),
            "contracted, cut": lambda w, x: torch.einsum("ntd,dab->ntab", x, w.unflatten(1, (2, 2))),
            "normalised": lambda w, x: F.layer_norm(x, (4, 4), w),
            "normalised, transposed": lambda w, x: F.layer_norm(x, (4, 4), w.T),
            "expanded": lambda w, x: torch.cat([w.expand(len(x), 4, 4), x], 1),
            "expanded, transposed": lambda w, x: torch.cat([w.T.expand(len(x), 4, 4), x], 1),
            "repeated, transposed": lambda w, x: torch.cat([w.T.repeat(len(x), 1, 1), x], 1),
        }.items()
    },
    "columns indexed": net(lambda: {"w": torch.randn(4, 9)}, lambda m, x: m.w.T[x], 5, tokens=9),
    "columns indexed, a square": net(lambda: {"w": torch.randn(5, 5)}, lambda m, x: m.w.T[x], 5, tokens=5),
    "columns selected": net(
        lambda: {"w": torch.randn(4, 9)},
        lambda m, x: m.w.index_select(1, x.flatten()).view(4, -1, 5).transpose(0, 1),
        5,
        tokens=9,
    ),
    "one row selected": net(
        lambda: {"w": torch.randn(9, 6)}, lambda m, x: x * torch.index_select(m.w, 0, torch.tensor(3)), 4, 6
    ),
    "indexed in two axes": net(lambda: {"w": torch.randn(9, 9)}, lambda m, x: m.w[x, x.flip(1)], 5, tokens=9),
    "indexed by a mask": net(_token(6), lambda m, x: x[..., :3] * m.token[torch.arange(6) % 2 == 0], 4, 6),
    "a bag with parameters for weights": net(
        lambda: {"w": torch.randn(9, 4), "scale": torch.randn(5)},
        lambda m, x: F.embedding_bag(x, m.w, mode="sum", per_sample_weights=m.scale.expand(len(x), -1)),
        5,
        tokens=9,
    ),
    "a bag scaled by frequency": net(
        lambda: {"w": torch.randn(9, 4)}, lambda m, x: F.embedding_bag(x, m.w, scale_grad_by_freq=True), 5, tokens=9
    ),
    "a parameter rectified": net(
        lambda: {"w": torch.randn(6), "slope": torch.rand(1)}, lambda m, x: x * F.prelu(m.w, m.slope), 4, 6
    ),
    "scaled by a parameter's exponential": net(_token(1), lambda m, x: x * m.token.exp(), 4, 6),
    "a number without dimensions": net(_token(), lambda m, x: x * m.token, 4, 6),
    "checkpointed": net(_three_linears, _checkpointed, 4, 6),
    "embedding scaled by frequency": net(
        lambda: {"embedding": nn.Embedding(3, 4, scale_grad_by_freq=True)}, lambda m, x: m.embedding(x), 5, tokens=3
    ),
    "gradient turned round": net(_linear(), lambda m, x: (lambda h: 2 * h.detach() - h)(m.fc(x)), 4, 6),
    "a hook that changes the output": net(_hooked, lambda m, x: m.fc(x), 4, 6),
    "complex numbers inside": net(_linear(), lambda m, x: torch.fft.rfft(m.fc(x), dim=1).abs(), 4, 6),
}
"""What a rule may serve or not, but must never get wrong: the result is exact or a refusal."""


def _swapped(rows: int, i: int, j: int) -> Tensor:
    order = torch.arange(rows)
    if rows > 1:
        order[[i, j]] = order[[j, i]]
    return order


def _linear_and_bias() -> dict[str, Any]:
    return {"fc": nn.Linear(6, 5, bias=False), "odd": torch.randn(5)}


def _step_by_step(m: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = m.odd(x[:, t], state)
    return state[0]


NO_RULE = {
    "lstm": net(lambda: {"odd": nn.LSTM(6, 5, batch_first=True)}, lambda m, x: m.odd(x)[0], 4, 6),
    "gru": net(lambda: {"odd": nn.GRU(6, 5, batch_first=True)}, lambda m, x: m.odd(x)[0], 4, 6),
    "autograd function": net(lambda: {"odd": torch.randn(6)}, lambda m, x: Double.apply(x, m.odd), 4, 6),
    "weight norm": net(
        lambda: {"odd": nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))}, lambda m, x: m.odd(x), 4, 6
    ),
    "sine of a parameter": net(lambda: {"odd": torch.randn(6)}, lambda m, x: x * m.odd.sin(), 4, 6),
    "cosine classifier": net(
        lambda: {"odd": torch.randn(5, 6)}, lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.odd)), 6
    ),
    "standardised weights": net(
        lambda: {"odd": torch.randn(4, 4, 3, 3)},
        lambda m, x: F.conv2d(x, (m.odd - m.odd.mean((1, 2, 3), True)) / m.odd.std((1, 2, 3), keepdim=True)),
        4,
        5,
        4,
    ),
    "bias doubled": net(_linear_and_bias, lambda m, x: F.linear(x, m.fc.weight) + m.odd * 2, 4, 6),
    "bag of embeddings, the largest": net(
        lambda: {"odd": nn.EmbeddingBag(9, 4, mode="max")}, lambda m, x: m.odd(x), 5, tokens=9
    ),
    "spectral norm": net(
        lambda: {"odd": nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))}, lambda m, x: m.odd(x), 4, 6
    ),
    "rnn": net(lambda: {"odd": nn.RNN(6, 5, batch_first=True)}, lambda m, x: m.odd(x)[0], 4, 6),
    "a cell step by step": net(lambda: {"odd": nn.LSTMCell(6, 5)}, _step_by_step, 4, 6),
}
"""One parameter (or module) called ``odd`` each, used in a way that no rule serves."""


# ------------------------------------------------------------------------------------------------- whole architectures


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(4, channels), channels)


class Residual(nn.Module):
    """Two 3x3 convolutions with normalisation, added to their input."""

    def __init__(self, i: int, o: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), norm(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), norm(o)
        changes = stride != 1 or i != o
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o)) if changes else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        h += self.down(x)
        return self.relu(h)


class ResNet(nn.Module):
    """ResNet-18 for small images: stages of ``width`` times 1, 2, 4, 8 channels, two blocks each."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width)
        blocks, before = [], width
        for stage in range(4):
            o = width << stage
            blocks += [Residual(before, o, 2 if stage else 1, norm), Residual(o, o, 1, norm)]
            before = o
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm1(self.conv1(x)))).mean((2, 3)))


class SelfAttention(nn.Module):
    """Attention with one matrix for queries, keys and values, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return self.drop(self.proj(h.transpose(1, 2).reshape(n, t, d)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(width), SelfAttention(width, heads), LayerScale(width)
        self.norm2, self.scale2 = nn.LayerNorm(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attn(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches by convolution, class token, position embedding, blocks with layer scale, as timm's are."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, image: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // 4) ** 2 + 1, width) * 0.2)
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), h], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(h))[:, 0])


class TextClassifier(nn.Module):
    """Tokens (N, T), 0 is padding; everything between is sequence first, as nn.MultiheadAttention was first made."""

    def __init__(self, words: int = 30, width: int = 12, length: int = 9, classes: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(length, 1, width) * 0.3)
        self.attention = nn.MultiheadAttention(width, 3, dropout=0.2)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        padding[:, 0] = False
        h = self.words(tokens.t()) + self.positions[: tokens.shape[1]]
        h = self.norm(h + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0])
        h = h + self.fc2(F.gelu(self.fc1(h)))
        kept = (~padding).t()[..., None].to(h.dtype)
        return self.head((h * kept).sum(0) / kept.sum(0))


class Tabular(nn.Module):
    """Rows of 4 numbers and 3 categories (as numbers): embeddings, LayerNorm, residual perceptron."""

    def __init__(self, sizes: tuple[int, ...] = (5, 3, 7), width: int = 14, classes: int = 4) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(size, 3) for size in sizes])
        self.sizes = sizes
        self.first = nn.Linear(4 + 3 * len(sizes), width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        categories = x[:, 4:].abs().mul(10).long()
        embedded = [
            e(categories[:, k] % size) for k, (e, size) in enumerate(zip(self.embeddings, self.sizes, strict=True))
        ]
        h = self.first(torch.cat([x[:, :4], *embedded], 1))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + torch.relu(layer(norm(h)))
        return self.head(h)


class Columns(nn.Module):
    """Rows of category numbers, each column with a vocabulary of its own, the last one largest."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(size, 3) for size in (2, 4, 9)])
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([e(x[:, k].long()) for k, e in enumerate(self.embeddings)], 1).tanh())


ARCHITECTURES = {
    "resnet-18 with group norm": Case(lambda: ResNet(group_norm, width=4), (3, 32, 32), rows=4, classes=10),
    "resnet-18 with batch norm": Case(lambda: ResNet(nn.BatchNorm2d, width=4), (3, 32, 32), rows=4, classes=10),
    "vit": Case(ViT, (3, 16, 16), rows=6, classes=5),
    "text classifier": Case(TextClassifier, (9,), tokens=30, rows=8, classes=3),
    "tabular mlp": Case(Tabular, (7,), rows=9, classes=4),
}
"""Whole networks, small enough for a loop over single samples in float64."""
