"""The vision transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradmix.training.models.transformer_block import Block, initialise


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021): patches and a class token pass pre-norm blocks; the class token is classified.

    Positions are learnt, one for each patch and for the class token, so the model takes images of the size that it was
    built for. There is no dropout. Linear layers, tokens and positions start as normal numbers of deviation 0.02, the
    patches' projection with deviation 1 / sqrt(fan in), biases at 0. Images of 3 x 224 x 224 and 1000 classes make
    86,567,656 parameters with patches of 16, width 768, 12 blocks and 12 heads ('ViT-B/16'), and 5,717,416 with width
    192 and 3 heads ('ViT-Ti/16', Touvron et al. 2021).

    The gradient engine (:func:`gradmix.sample_gradients`) has rules for all parameters, class token and positions
    included.

    Args:
        input_shape: ``(C, H, W)`` of an image; both sides multiples of ``patch``.
        num_classes: Width of the output.
        patch: Side of a patch, in pixels.
        width: Width of a position.
        depth: Blocks.
        heads: Heads of each block.

    Raises:
        ValueError: The patch does not divide the image, the heads do not divide the width, or there is no block.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, *, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        if patch < 1 or height % patch or breadth % patch:
            raise ValueError(f"input_shape: got {tuple(input_shape)}, expected sides that are multiples of {patch}")
        if depth < 1:
            raise ValueError(f"depth: got {depth}, expected at least 1")
        self.input_shape = (channels, height, breadth)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // patch) * (breadth // patch), width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        initialise(self)
        nn.init.normal_(self.patches.weight, std=1 / math.sqrt(channels * patch**2))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    @property
    def hidden_stages(self) -> tuple[nn.Module, ...]:
        """The modules that take in what comes out of the first and the second third of the blocks."""
        stages = (*self.blocks, self.norm)
        places = sorted({max(1, round(len(self.blocks) * share / 3)) for share in (1, 2)})
        return tuple(stages[place] for place in places)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``x (N, C, H, W)``.

        Raises:
            ValueError: The images are not of the size that the model was built for.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            sizes = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x: got {tuple(x.shape)}, expected (N, {sizes}): the model was built for that size")
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(h))[:, 0])
        return logits
