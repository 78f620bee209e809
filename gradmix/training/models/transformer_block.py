"""The block that the transformers for images and for texts are built of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): softmax(q kᵀ / sqrt(d) + bias) v for each head of width d.

    Queries, keys and values come from one linear layer, in this order and head by head.

    Args:
        width: Width of a position.
        heads: Heads, between which the width is shared out.

    Raises:
        ValueError: The heads do not divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of the width {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, T, width)`` to the same shape.

        Args:
            x: Positions of the samples.
            bias: ``(N, T)``, added to the scores of a key for every head and query; ``None``: nothing.
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.projection(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, then two linear layers with GELU; each normalised before and added to its input ('pre-norm').

    Args:
        width: Width of a position; the hidden layer has four times as much.
        heads: Heads of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, T, width)`` to the same shape; ``bias`` as in :class:`SelfAttention`."""
        x = x + self.attention(self.norm1(x), bias)
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


def initialise(model: nn.Module) -> None:
    """Weights of linear layers normal with deviation 0.02, their biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
