"""Decoders as language models have them: every variant is served by rules or refused by name, and exact on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_networks import randomise
from gradient_truth import assert_layers_equal
from torch import Tensor, nn

import gradmix
from gradmix.gradients import NoRuleError
from gradmix.gradients.directions import directional_derivatives, mean_gradient
from gradmix.model.inputs import call_model, num_samples, take

EXACT = 1e-9
VOCABULARY, WIDTH, HEADS, GROUPS, CLASSES = 19, 8, 4, 2, 3


class Norm(nn.Module):
    """RMSNorm by hand: the weight times what was normalised in float32 or better, ``offset`` added to the weight."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return h * (self.offset + self.weight) if self.offset else self.weight * h.to(x.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class Attention(nn.Module):
    """Grouped queries with rotary positions, causal."""

    def __init__(self, grouped: str, bias: bool) -> None:
        super().__init__()
        self.grouped, d = grouped, WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * d, bias=bias), nn.Linear(WIDTH, GROUPS * d, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, WIDTH // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.tensor([1.0, 1.0], dtype=x.dtype)
        q, k = (rotated(h, angle.cos(), angle.sin()) for h in (q, k))
        more: dict[str, Any] = {}
        if self.grouped == "enable_gqa":
            more["enable_gqa"] = True
        elif self.grouped == "repeat_interleave":
            k, v = (h.repeat_interleave(HEADS // GROUPS, 1) for h in (k, v))
        else:
            k, v = (h[:, :, None].expand(-1, -1, HEADS // GROUPS, -1, -1).flatten(1, 2) for h in (k, v))
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        h = F.scaled_dot_product_attention(q, k, v, causal if mask is None else causal & mask[:, None, None, :], **more)
        return self.o(h.transpose(1, 2).reshape(n, t, -1))


class Gated(nn.Module):
    """SwiGLU, with one matrix for gate and value or two."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged, size = merged, 6
        self.down = nn.Linear(size, WIDTH, bias=False)
        if merged:
            self.both = nn.Linear(WIDTH, 2 * size, bias=False)
        else:
            self.gate, self.up = nn.Linear(WIDTH, size, bias=False), nn.Linear(WIDTH, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.merged else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


@dataclass
class Output:
    """Logits among other things."""

    logits: Tensor


class Decoder(nn.Module):
    """Two blocks.

    Args:
        norm: "hand", "torch", or "plus one" as Gemma has it.
        grouped: how keys and values are shared by heads.
        end: "tied" and "untied" language models, or a classifier of the "last" token or of the "mean".
    """

    def __init__(
        self, norm: str = "hand", grouped: str = "expand", end: str = "last", merged: bool = False, scale: bool = False
    ) -> None:
        super().__init__()
        kinds = {"hand": Norm, "torch": lambda: nn.RMSNorm(WIDTH), "plus one": lambda: Norm(1.0)}
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.norms = nn.ModuleList(kinds[norm]() for _ in range(5))
        self.attention = nn.ModuleList(Attention(grouped, bias=merged) for _ in range(2))
        self.mlp = nn.ModuleList(Gated(merged) for _ in range(2))
        self.score = nn.Linear(WIDTH, VOCABULARY if "tied" in end else CLASSES, bias=False)
        if end == "tied":
            self.score.weight = self.embedding.weight
        self.end, self.scale = end, scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        h = self.embedding(input_ids)
        if self.scale:
            h = h * torch.tensor(WIDTH**0.5, dtype=h.dtype)
        mask = None if attention_mask is None else attention_mask.bool()
        for index in range(2):
            h = h + self.attention[index](self.norms[2 * index](h), mask)
            h = h + self.mlp[index](self.norms[2 * index + 1](h))
        z = self.score(self.norms[4](h))
        if self.end == "mean":
            z = z.mean(1)
        elif self.end == "last":
            last = input_ids.shape[1] - 1 if mask is None else attention_mask.sum(1) - 1
            z = z[torch.arange(len(z)), last]
        return Output(z)


def next_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").mean(1)


def built(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder(**options).double()
    randomise(model)
    return model


def single(model: nn.Module, x: Any, y: Tensor, loss: Any) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = []
    for n in range(num_samples(x)):
        one = slice(n, n + 1)
        value = loss(call_model(model, take(x, one)).logits, y[one]).sum()
        found.append(torch.autograd.grad(value, list(named.values())))
    return {name: torch.stack(rows) for name, rows in zip(named, zip(*found, strict=True), strict=True)}


def batch(rows: int, length: int, padded: bool) -> Any:
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=g)
    if not padded:
        return ids
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


VARIANTS: dict[str, dict[str, Any]] = {
    "last token": {},
    "last token, RMSNorm of torch": {"norm": "torch", "grouped": "enable_gqa"},
    "mean, one matrix for gate and value": {"end": "mean", "merged": True, "grouped": "repeat_interleave"},
    "mean, scaled embeddings": {"end": "mean", "scale": True, "grouped": "enable_gqa"},
    "language model": {"end": "untied"},
    "language model, tied": {"end": "tied", "grouped": "enable_gqa"},
    "one added to the norms' weights": {"norm": "plus one", "scale": True},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", VARIANTS, ids=str)
def test_equals_the_loop_over_single_samples(name: str, padded: bool) -> None:
    model, x = built(**VARIANTS[name]), batch(5, 6, padded)
    language = "tied" in VARIANTS[name].get("end", "")
    y = torch.randint(VOCABULARY, (5, 6)) if language else torch.randint(CLASSES, (5,))
    loss = next_token if language else lambda z, y: F.cross_entropy(z, y, reduction="none")
    given: dict[str, Any] = {"sketch": "identity", "loss": next_token if language else None}
    expected = single(model, x, y, loss)
    try:
        result = gradmix.sample_gradients(model, (x, y), **given)
    except NoRuleError as error:
        assert VARIANTS[name].get("norm") == "plus one"
        assert "norms.0.weight" in str(error) and "without_rule='exact'" in str(error)
    else:
        assert_layers_equal(result, expected, EXACT)
    exact = gradmix.sample_gradients(model, (x, y), without_rule="exact", **given)
    assert_layers_equal(exact, expected, EXACT)
    mean = mean_gradient(model, (x, y), loss=given["loss"])
    found = directional_derivatives(model, (x, y), mean, loss=given["loss"], without_rule="exact").inner
    rows = torch.cat([g.flatten(1) for g in expected.values()], 1)
    along = torch.cat([mean[k].flatten() for k in expected])
    assert torch.allclose(found, rows @ along, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_any_number_of_tokens(length: int) -> None:
    model, x, y = built(norm="torch", end="mean"), batch(4, length, False), torch.arange(4) % CLASSES
    expected = single(model, x, y, lambda z, y: F.cross_entropy(z, y, reduction="none"))
    assert_layers_equal(gradmix.sample_gradients(model, (x, y), sketch="identity"), expected, EXACT)
