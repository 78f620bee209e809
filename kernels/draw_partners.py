"""One partner for each row, drawn among the allowed columns of its row of a matrix: the kernels of ``draw_partners``.

A program has one row and walks over its columns in blocks, at most three times: for the largest score, to count the
columns that may be drawn, and to find the one whose rank was drawn, by a running sum within the block. All of it is
comparisons and counts, so the result does not depend on the block. The policy ``permute`` looks at a single entry of
each row, and there a program has a block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from gradmix.kernels import Variant
from torch import Tensor


@triton.jit
def _candidates(
    allowed, row, columns, partners, stride, HAS_ALLOWED: tl.constexpr, OWN_ROWS: tl.constexpr
):  # fmt: skip
    """Whether each of the columns may be drawn, scores apart."""
    inside = columns < partners
    if HAS_ALLOWED:
        inside = inside & (tl.load(allowed + row * stride + columns, mask=inside, other=0) != 0)
    if OWN_ROWS:
        inside = inside & (columns != row)
    return inside


@triton.jit
def _scores(score, row, columns, stride, mask):
    values = tl.load(score + row * stride + columns, mask=mask, other=-float("inf"))
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    return values


@triton.jit
def _draw(
    allowed,
    drawn,
    score,
    partner,
    found,
    partners,
    allowed_stride,
    score_stride,
    HAS_ALLOWED: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if HAS_SCORE:
        # A lane's largest score so far; one reduction over the lanes ends it.
        best = tl.full((BLOCK,), -float("inf"), tl.float64 if score.dtype.element_ty == tl.float64 else tl.float32)
        for start in range(0, partners, BLOCK):
            mask = _candidates(allowed, row, start + lanes, partners, allowed_stride, HAS_ALLOWED, OWN_ROWS)
            values = _scores(score, row, start + lanes, score_stride, mask)
            best = tl.where(values > best, values, best)  # never true of a NaN
        top = tl.max(best, 0)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, partners, BLOCK):
        mask = _candidates(allowed, row, start + lanes, partners, allowed_stride, HAS_ALLOWED, OWN_ROWS)
        if HAS_SCORE:
            mask = mask & (_scores(score, row, start + lanes, score_stride, mask) == top)
        counts += mask.to(tl.int32)
    count = tl.sum(counts, 0)
    rank = (tl.load(drawn + row) * count.to(tl.float64)).to(tl.int64)
    rank = tl.minimum(tl.maximum(rank, 0), tl.maximum(count - 1, 0)).to(tl.int32)
    before = 0
    column = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, partners, BLOCK):
        mask = _candidates(allowed, row, start + lanes, partners, allowed_stride, HAS_ALLOWED, OWN_ROWS)
        if HAS_SCORE:
            mask = mask & (_scores(score, row, start + lanes, score_stride, mask) == top)
        running = before + tl.cumsum(mask.to(tl.int32), 0)
        column += tl.where(mask & (running == rank + 1), start + lanes, 0).to(tl.int64)
        before += tl.sum(mask.to(tl.int32), 0)
    nobody = row if OWN_ROWS else row * 0
    tl.store(partner + row, tl.where(count > 0, tl.sum(column, 0), nobody))
    tl.store(found + row, (count > 0).to(tl.uint8))


@triton.jit
def _keep(
    allowed,
    drawn,
    partner,
    found,
    rows,
    partners,
    allowed_stride,
    HAS_ALLOWED: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    column = tl.load(drawn + row, mask=inside, other=0)
    kept = inside & (column >= 0) & (column < partners)
    if HAS_ALLOWED:
        kept = kept & (tl.load(allowed + row * allowed_stride + column, mask=kept, other=0) != 0)
    if OWN_ROWS:
        kept = kept & (column != row)
    nobody = row if OWN_ROWS else row * 0
    tl.store(partner + row, tl.where(kept, column, nobody), mask=inside)
    tl.store(found + row, kept.to(tl.uint8), mask=inside)


KEPT_ROWS = 128
"""Rows of a program of the policy ``permute``."""

CONFIGURATIONS = ((512, 4), (2048, 8))
"""(columns of a block, warps), of which the first that holds all columns is taken, or the last."""


def configuration(partners: int) -> tuple[int, int]:
    """Columns of a block and warps for that many columns."""
    for block, warps in CONFIGURATIONS:
        if partners <= block:
            return block, warps
    return CONFIGURATIONS[-1]


def draw_partners(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, permute: bool, own_rows: bool
) -> tuple[Tensor, Tensor]:
    """Partners (N,) int64 and whether there is one (N,) bool; one launch, nothing waited for.

    Args:
        allowed: (N, M) bool, or None: all.
        drawn: (N,) float64, or int64 if ``permute``.
        score: (N, M), of which only the largest allowed of a row may be drawn; None: all may.
        partners: M.
        permute: what was drawn is the column itself.
        own_rows: no row is its own partner.
    """
    rows = drawn.shape[0]
    drawn = drawn.contiguous()
    partner = torch.empty(rows, dtype=torch.int64, device=drawn.device)
    found = torch.empty(rows, dtype=torch.bool, device=drawn.device)
    if rows == 0:
        return partner, found
    # Where there is no such matrix, any pointer will do: it is not read.
    mask = found.view(torch.uint8) if allowed is None else _rows_of(allowed).view(torch.uint8)
    mask_stride = 0 if allowed is None else mask.stride(0)
    with torch.cuda.device_of(drawn):
        if permute:
            _keep[(triton.cdiv(rows, KEPT_ROWS),)](
                mask, drawn, partner, found.view(torch.uint8), rows, partners, mask_stride,
                HAS_ALLOWED=allowed is not None, OWN_ROWS=own_rows, BLOCK=KEPT_ROWS, num_warps=4,
            )  # fmt: skip
        else:
            block, warps = configuration(partners)
            ranked = drawn if score is None else _rows_of(score)
            _draw[(rows,)](
                mask, drawn, ranked, partner, found.view(torch.uint8), partners, mask_stride,
                0 if score is None else ranked.stride(0),
                HAS_ALLOWED=allowed is not None, HAS_SCORE=score is not None, OWN_ROWS=own_rows, BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
    return partner, found


def _rows_of(matrix: Tensor) -> Tensor:
    """The matrix, its columns next to each other in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def variants() -> Iterator[Variant]:
    """The specialisations worth compiling ahead of time."""
    matrix = {"allowed": "*u8", "drawn": "*fp64", "score": "*fp32", "partner": "*i64", "found": "*u8"}
    sizes = {"partners": "i32", "allowed_stride": "i32", "score_stride": "i32"}
    constants = dict.fromkeys(("HAS_ALLOWED", "HAS_SCORE", "OWN_ROWS", "BLOCK"), "constexpr")
    for block, warps in CONFIGURATIONS:
        for kind in ("uniform", "best"):
            values: dict[str, Any] = {
                "HAS_ALLOWED": True,
                "HAS_SCORE": kind == "best",
                "OWN_ROWS": True,
                "BLOCK": block,
            }
            yield Variant(
                f"draw_partners {kind} {block}", _draw, matrix | sizes | constants, values, warps, 3, max_registers=128
            )
    signature = {
        "allowed": "*u8",
        "drawn": "*i64",
        "partner": "*i64",
        "found": "*u8",
        "rows": "i32",
        "partners": "i32",
        "allowed_stride": "i32",
        **dict.fromkeys(("HAS_ALLOWED", "OWN_ROWS", "BLOCK"), "constexpr"),
    }
    yield Variant(
        "draw_partners permute",
        _keep,
        signature,
        {"HAS_ALLOWED": True, "OWN_ROWS": True, "BLOCK": KEPT_ROWS},
        4,
        3,
        max_registers=64,
    )
