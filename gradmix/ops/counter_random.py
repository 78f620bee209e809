"""Random matrices by counter: an entry depends on the matrix's key and on its own row and column, and on nothing else.

So a matrix is the same on every device, in any slices and in any order, and none of it has to be kept. The generator
is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011), which turns a
key of two 32-bit words and a counter of four into four random words. Entry (i, j) of a matrix of key K and rank r is

    rademacher  word = philox((j // 4) % 2^32, (j // 4) // 2^32, i // 32, 0; K)[j % 4]
                +1 / sqrt(r) if bit i % 32 of word is set, else -1 / sqrt(r)
    gaussian    word = philox((j // 4) % 2^32, (j // 4) // 2^32, i // 2, 1; K)[j % 4]
                table[u] / sqrt(r), u being the low (i even) or high (i odd) 16 bits of word

with the table of :func:`normal_quantiles`. Entries have mean 0 and variance 1 / r; the first rows of a matrix are, up
to the scale, those of one of smaller rank with the same key.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

ENTRIES = ("rademacher", "gaussian")
"""The distributions that entries may have."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_ROWS = {"rademacher": 32, "gaussian": 2}
"""Rows whose entries come out of one word."""
_STREAM = {"rademacher": 0, "gaussian": 1}
"""The counter's last word."""


def sketch_key(seed: int, name: str, side: str) -> int:
    """The key of one side's matrix for one parameter.

    It is made of the first 8 bytes, little endian, of the BLAKE2b hash of ``seed``, ``name`` and ``side`` with zero
    bytes in between: the same in every process, and as good as independent for any two that differ.

    Args:
        seed: any integer.
        name: of the parameter or layer.
        side: which of its matrices, ``"left"`` and ``"right"`` say.

    Returns:
        A signed 64-bit integer.

    >>> sketch_key(0, "head.weight", "left") == sketch_key(0, "head.weight", "left")
    True
    >>> sketch_key(0, "head.weight", "left") == sketch_key(1, "head.weight", "left")
    False
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, expected int")
    digest = hashlib.blake2b(f"{seed}\0{name}\0{side}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def random_matrix(
    rank: int,
    dim: int,
    key: int,
    entries: str = "rademacher",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The matrix of a key, its entries of mean 0 and variance 1 / ``rank``.

    Args:
        rank: number of rows, at least 1.
        dim: number of columns, at least 0.
        key: a signed 64-bit integer, such as :func:`sketch_key` gives.
        entries: ``"rademacher"`` (plus and minus 1 / sqrt(rank)) or ``"gaussian"``.
        dtype: a floating-point dtype; the entries, which are float64 numbers, are rounded to it.
        device: where the matrix shall be; the default is torch's.

    Returns:
        (rank, dim).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    >>> random_matrix(4, 3, key=7).abs()
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    check_matrix(rank, key, entries, dtype)
    _check_int("dim", dim, 0)
    blocks = torch.arange((dim + 3) // 4, device=device)
    # (groups, 4, blocks) -> (groups, columns): the columns of a block are next to each other.
    words = _words(blocks, _groups(rank, entries, blocks), key, entries)
    words = words.transpose(1, 2).flatten(1)[:, :dim]
    return _entries(words, rank, entries, dtype, rows_last=False)


def random_columns(
    index: Tensor, rank: int, key: int, entries: str = "rademacher", *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Columns of the matrix of a key, as rows.

    It is ``random_matrix(rank, dim, key)[:, index]`` with its first axis moved last. For inputs that are indices, such
    as tokens: the product of the matrix with their one-hot vectors.

    Args:
        index: (...,) int64, at least 0. It is looked through for negative entries on the CPU only: a GPU would have to
            be waited for.
        rank: number of rows of the matrix, at least 1.
        key: a signed 64-bit integer.
        entries: ``"rademacher"`` or ``"gaussian"``.
        dtype: a floating-point dtype.

    Returns:
        (..., rank), on the device of ``index``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range.
    """
    check_matrix(rank, key, entries, dtype)
    if not isinstance(index, Tensor):
        raise TypeError(f"index: got {type(index).__name__}, expected a tensor")
    if index.dtype != torch.int64:
        raise TypeError(f"index: got dtype {index.dtype}, expected int64")
    flat = index.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and int(flat.min()) < 0:
        raise ValueError(f"index: got {int(flat.min())}, expected columns of at least 0")
    words = _words(flat >> 2, _groups(rank, entries, flat), key, entries)
    words = words.gather(1, (flat & 3).expand(words.shape[0], 1, -1)).squeeze(1)
    return _entries(words, rank, entries, dtype, rows_last=True).view(*index.shape, rank)


def check_matrix(rank: int, key: int, entries: str, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless these describe a random matrix."""
    _check_int("rank", rank, 1)
    if isinstance(key, bool) or not isinstance(key, int):
        raise TypeError(f"key: got {type(key).__name__}, expected int")
    if not -(1 << 63) <= key < 1 << 63:
        raise ValueError(f"key: got {key}, expected a signed 64-bit integer")
    if entries not in ENTRIES:
        raise ValueError(f"entries: got {entries!r}, expected 'rademacher' or 'gaussian'")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: (4, ...) int64, the counters' words, each in [0, 2^32).
        key: two words, each in [0, 2^32).

    Returns:
        (4, ...) int64, each in [0, 2^32).
    """
    # The pairs of words (0, 2), which are multiplied, and (1, 3), side by side: half as many calls.
    even, odd = counter[0::2], counter[1::2]
    axes = [2] + [1] * (counter.ndim - 1)
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device).view(axes)
    weyl = torch.tensor(_WEYL, device=counter.device).view(axes)
    keys = torch.tensor(key, device=counter.device).view(axes)
    for _ in range(_ROUNDS):
        # A product of two 32-bit words fits into 64 bits, but not into 63: by halves of the one factor.
        low = (even & 0xFFFF) * multipliers
        middle = (even >> 16) * multipliers + (low >> 16)
        even = (middle >> 16).flip(0) ^ odd ^ keys
        odd = ((middle & 0xFFFF) << 16 | low & 0xFFFF).flip(0)
        keys = (keys + weyl) & _WORD
    return torch.stack((even, odd), 1).flatten(0, 1)


def normal_quantiles() -> Tensor:
    """The normal distribution in 65,536 equally likely values: its quantiles at (u + 1/2) / 65,536, of variance 1.

    Returns:
        (65536,) float32 on the CPU; entry 65535 - u is minus entry u to the bit, so the mean is 0.
    """
    return torch.from_numpy(_quantiles().astype(np.float32))


@lru_cache(maxsize=1)
def _quantiles() -> np.ndarray[Any, np.dtype[np.float64]]:
    """The table's values, rounded to float32 but held in float64 for what follows."""
    half = 1 << 15
    upper = (torch.arange(half, dtype=torch.float64, device="cpu") + half + 0.5) / (2 * half)
    positive = torch.special.ndtri(upper).numpy()
    positive = (positive / np.sqrt(np.mean(positive**2))).astype(np.float32).astype(np.float64)
    return np.concatenate((-positive[::-1], positive))


def _groups(rank: int, entries: str, like: Tensor) -> Tensor:
    rows = _ROWS[entries]
    return torch.arange((rank + rows - 1) // rows, device=like.device)


def _words(blocks: Tensor, groups: Tensor, key: int, entries: str) -> Tensor:
    """(G, 4, B): the words of each of (B,) blocks of columns for each of (G,) groups of rows."""
    shape = len(groups), len(blocks)
    counter = torch.stack(
        (
            (blocks & _WORD).expand(shape),
            (blocks >> 32 & _WORD).expand(shape),
            groups[:, None].expand(shape),
            torch.full_like(blocks, _STREAM[entries]).expand(shape),
        )
    )
    return philox4x32(counter, (key & _WORD, key >> 32 & _WORD)).transpose(0, 1)


def _entries(words: Tensor, rank: int, entries: str, dtype: torch.dtype, *, rows_last: bool) -> Tensor:
    """The matrix's entries from (G, n) words, one for each group of rows and column: (rank, n), or (n, rank)."""
    scale = 1.0 / math.sqrt(rank)
    rows = _ROWS[entries]
    part = torch.arange(rows, device=words.device)
    words = words.T.unsqueeze(2) if rows_last else words.unsqueeze(1)
    if not rows_last:
        part = part.unsqueeze(1)
    if entries == "rademacher":
        values = torch.tensor((-scale, scale), dtype=torch.float64, device="cpu")
        which = words >> part & 1
    else:
        values = torch.from_numpy(_quantiles() * scale)
        which = words >> 16 * part & 0xFFFF
    which = which.flatten(1)[:, :rank] if rows_last else which.flatten(0, 1)[:rank]
    return values.to(dtype).to(words.device)[which]


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
