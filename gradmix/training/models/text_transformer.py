"""A small transformer for texts whose embedded form can be mixed, padding included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmix.training.models.transformer_block import Block, initialise


class TextTransformer(nn.Module):
    """Logits of token ids: embedding, pre-norm blocks, the mean over the tokens, the classifier.

    What the rest of the model reads is the embedding's output alone, ``(N, T, width + 1)``: a vector for each position
    and, in the last channel, how far a token is there, its *presence* p in [0, 1]. Attention adds log p to the scores
    of a position, and the mean is sum p h / sum p. A position without a token has weight 0 everywhere, so padding does
    not change a text's logits. A linear mixture of two embedded texts is an embedded text of its own: where only one
    has a token, the mixture has its token with the weight of that text. A sample without any token has the classifier's
    bias as its logits.

    Linear layers start as normal numbers of deviation 0.02, embeddings and positions of deviation 1; no dropout.

    Args:
        vocabulary: Number of ids, the padding's 0 among them.
        length: The most tokens that a text may have.
        num_classes: Width of the output.
        width: Width of a position.
        depth: Blocks.
        heads: Heads of each block.

    Raises:
        ValueError: There are no ids beside the padding, no position or no block, or the heads do not divide the width.
    """

    def __init__(
        self, vocabulary: int, length: int, num_classes: int, *, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        for name, got, least in (("vocabulary", vocabulary, 2), ("length", length, 1), ("depth", depth, 1)):
            if got < least:
                raise ValueError(f"{name}: got {got}, expected at least {least}")
        self.embedding = TextEmbedding(vocabulary, length, width)
        self.blocks = nn.Sequential(*(PresenceBlock(width, heads) for _ in range(depth)))
        self.pooled = PresenceMean(width)
        self.head = nn.Linear(width, num_classes)
        initialise(self)

    @property
    def mixing_stage(self) -> nn.Module:
        """The module whose output may be mixed in place of the input: the embedding."""
        return self.embedding

    @property
    def hidden_stages(self) -> tuple[nn.Module, ...]:
        """The modules that take in what comes out of the first two blocks, presence included."""
        return (*self.blocks, self.pooled)[1:3]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of ids ``x (N, T)`` int64 in [0, vocabulary), 0 for padding; T up to ``length``.

        Raises:
            ValueError: The shape is another, or a text is too long.
            TypeError: The ids are no integers.
        """
        logits: Tensor = self.head(self.pooled(self.blocks(self.embedding(x))))
        return logits


class TextEmbedding(nn.Module):
    """A vector for each token, the sum of the id's and the position's, and its presence: 1, or 0 for padding (id 0).

    The vector of padding is 0.
    """

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        # Not small as a ViT's: the blocks normalise first, which makes gradients of small vectors large, and plain SGD
        # at a rate of 0.05 does not learn then.
        nn.init.normal_(self.tokens.weight)
        nn.init.normal_(self.positions)

    def forward(self, x: Tensor) -> Tensor:
        """Ids ``(N, T)`` to ``(N, T, width + 1)``: the vectors and, last, the presence."""
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x: got {x.dtype}, expected token ids, int64")
        length = len(self.positions)
        if x.ndim != 2 or not 1 <= x.shape[1] <= length:
            raise ValueError(f"x: got {tuple(x.shape)}, expected (N, T) with T of 1 to {length}")
        vectors = self.tokens(x) + self.positions[: x.shape[1]]
        presence = (x != 0).to(vectors.dtype).unsqueeze(2)
        return torch.cat([vectors * presence, presence], 2)


class PresenceBlock(nn.Module):
    """A :class:`Block` on positions with a presence, which passes unchanged; vectors without a token stay 0.

    ``width`` is that of a position, presence not counted.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = Block(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, width + 1)`` to the same shape."""
        presence = x[..., -1]
        here = presence > 0
        # Half the lowest number in place of log 0: such a position's weight is exactly 0, and a sample of none but
        # these has no NaN. The inner where keeps the logarithm's gradient finite too.
        lowest = torch.finfo(torch.float16).min / 2
        bias = torch.where(here, torch.where(here, presence, 1.0).log(), lowest)
        h = self.block(x[..., :-1], bias)
        # What a position without a token got from the others must not leak into a mixture made here.
        return torch.cat([h * here.unsqueeze(2), x[..., -1:]], 2)


class PresenceMean(nn.Module):
    """The mean over positions, weighted by their presence, of the normalised vectors; 0 where nothing is present."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, width + 1)`` to ``(N, width)``."""
        presence = x[..., -1:]
        total = presence.sum(1)
        mean: Tensor = (presence * self.norm(x[..., :-1])).sum(1) / torch.where(total > 0, total, 1.0)
        return mean
