"""Random matrices by counter: the generator's published vectors, and entries that depend on their place alone."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from gradmix.ops.counter_random import (
    normal_quantiles,
    philox4x32,
    random_columns,
    random_matrix,
    sketch_key,
)

ENTRIES = ["rademacher", "gaussian"]

# Counter, key and words, as the authors of the generator publish them for philox4x32-10.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "digits of pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def words(text):
    return [int(word, 16) for word in text.split()]


def philox(counter, key):
    """The generator once more, for one counter, in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & 0xFFFFFFFF, first >> 32 ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def entry(i, j, rank, key, entries):
    """Entry (i, j) of a matrix, by the definition."""
    block = j // 4
    key_words = key % 2**32, key // 2**32 % 2**32
    if entries == "rademacher":
        word = philox((block % 2**32, block // 2**32, i // 32, 0), key_words)[j % 4]
        return (1 if word >> i % 32 & 1 else -1) / math.sqrt(rank)
    word = philox((block % 2**32, block // 2**32, i // 2, 1), key_words)[j % 4]
    u = word >> 16 if i % 2 else word & 0xFFFF
    return normal_quantiles()[u].item() / math.sqrt(rank)


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_known_answers(case):
    counter, key, expected = map(words, KNOWN_ANSWERS[case])
    assert philox(counter, key) == tuple(expected)
    # Among others, so that every element of a batch is right.
    batch = torch.tensor([[1, 2, 3, 4], counter, [5, 6, 7, 8]]).T
    found = philox4x32(batch, tuple(key))
    assert found[:, 1].tolist() == expected
    assert tuple(found[:, 2].tolist()) == philox((5, 6, 7, 8), key)


SIZES = {
    # name: (rank, dim)
    "one entry": (1, 1),
    "one row": (1, 9),
    "one column": (70, 1),
    "whole blocks": (32, 8),
    "odd sizes": (35, 11),
    "no columns": (3, 0),
}


@pytest.mark.parametrize("key", [0, -1, 1 << 40, -(1 << 63), (1 << 63) - 1], ids=str)
@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("size", SIZES)
def test_every_entry_is_by_definition(size, entries, key):
    rank, dim = SIZES[size]
    matrix = random_matrix(rank, dim, key, entries, dtype=torch.float64)
    expected = [[entry(i, j, rank, key, entries) for j in range(dim)] for i in range(rank)]
    assert matrix.shape == (rank, dim) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix, torch.tensor(expected, dtype=torch.float64).view(rank, dim), rtol=1e-15, atol=0)


@pytest.mark.parametrize("entries", ENTRIES)
def test_columns_far_out(entries):
    """Beyond 2^34 the number of a block of columns needs the counter's second word."""
    index = torch.tensor([(1 << 34) - 1, 1 << 34, (1 << 40) + 7, (1 << 63) - 1])
    found = random_columns(index, 3, 5, entries, dtype=torch.float64)
    expected = [[entry(i, j, 3, 5, entries) for i in range(3)] for j in index.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("entries", ENTRIES)
def test_columns_are_the_matrix(entries, shape):
    matrix = random_matrix(33, 50, -3, entries)
    index = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_columns(index, 33, -3, entries), matrix[:, index].movedim(0, -1))
    spread = torch.stack([index, index], -1)[..., 0]
    assert torch.equal(random_columns(spread, 33, -3, entries), matrix[:, index].movedim(0, -1))


@pytest.mark.parametrize("entries", ENTRIES)
def test_a_smaller_matrix_is_a_part_of_a_larger_one(entries):
    large = random_matrix(64, 40, 11, entries, dtype=torch.float64)
    for rank, dim in [(1, 40), (31, 7), (33, 40), (64, 1)]:
        part = random_matrix(rank, dim, 11, entries, dtype=torch.float64)
        torch.testing.assert_close(part * rank**0.5, large[:rank, :dim] * 8, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entries", ENTRIES)
def test_other_dtypes_are_roundings(entries, dtype):
    exact = random_matrix(24, 30, 4, entries, dtype=torch.float64)
    assert torch.equal(random_matrix(24, 30, 4, entries, dtype=dtype), exact.to(dtype))
    index = torch.arange(30)
    assert torch.equal(random_columns(index, 24, 4, entries, dtype=dtype), exact.T.to(dtype))


def test_without_a_choice_it_is_rademacher_in_float32():
    matrix = random_matrix(4, 6, 1)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix.abs(), torch.full((4, 6), 0.5))
    assert torch.equal(random_columns(torch.arange(6), 4, 1), matrix.T)


@pytest.mark.parametrize("entries", ENTRIES)
def test_moments(entries):
    """The mean, variance, and fourth moment of n independent entries, each within five of its standard errors."""
    rank, dim = 64, 5000
    values = random_matrix(rank, dim, 2024, entries, dtype=torch.float64) * rank**0.5
    n = values.numel()
    fourth, eighth = (1, 1) if entries == "rademacher" else (3, 105)
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.square().mean() - 1) <= 5 * ((fourth - 1) / n) ** 0.5 + 1e-12
    # The table ends at 4.3 standard deviations, which takes 0.0035 of the normal distribution's fourth moment of 3.
    assert abs(values.pow(4).mean() - fourth) <= 5 * ((eighth - fourth**2) / n) ** 0.5 + 0.004
    if entries == "gaussian":
        assert 4 < values.max() < 4.4 and values.min() > -4.4


@pytest.mark.parametrize("entries", ENTRIES)
def test_rows_columns_and_keys_are_uncorrelated(entries):
    """Between different rows, columns, words, halves of words and keys: correlations of the size that chance gives."""
    n = 20000
    first = random_matrix(40, n, 7, entries, dtype=torch.float64) * 40**0.5
    other = random_matrix(40, n, 8, entries, dtype=torch.float64) * 40**0.5
    both = torch.cat([first, other])
    between_rows = both @ both.T / n - torch.diag((both * both).mean(1))
    assert between_rows.abs().max() < 6 / n**0.5
    per_column = first.view(40, n // 8, 8).permute(2, 0, 1).reshape(8, -1)  # the places within two blocks
    between_columns = per_column @ per_column.T / per_column.shape[1]
    between_columns.fill_diagonal_(0)
    assert between_columns.abs().max() < 6 / per_column.shape[1] ** 0.5


@pytest.mark.parametrize("entries", ENTRIES)
def test_inner_products_are_kept_in_the_mean(entries):
    """<Mx, My> over keys: its mean is <x, y> within its standard error."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 37, generator=generator, dtype=torch.float64)
    found = []
    for key in range(400):
        matrix = random_matrix(8, 37, key, entries, dtype=torch.float64)
        found.append((matrix @ x) @ (matrix @ y))
    found = torch.stack(found)
    assert abs(found.mean() - x @ y) < 4 * found.std() / len(found) ** 0.5
    assert found.std() < 1.5 * (x.norm() * y.norm()) / 8**0.5


def test_the_table_of_normal_quantiles():
    table = normal_quantiles()
    assert table.shape == (1 << 16,) and table.dtype == torch.float32
    assert torch.equal(table, -table.flip(0))
    assert torch.equal(table, table.sort().values)
    assert abs(table.double().square().mean() - 1) < 1e-7
    for u in (0, 1, 20000, 32768, 65535):
        # The distribution function of each entry, but for the scaling to variance 1, which is 3e-6.
        below = 0.5 * math.erfc(-table[u].item() / 2**0.5)
        assert below == pytest.approx((u + 0.5) / 65536, rel=2e-4)


def test_keys():
    digest = hashlib.blake2b(b"3\0layer.weight\0left").digest()
    assert sketch_key(3, "layer.weight", "left") == int.from_bytes(digest[:8], "little", signed=True)
    keys = {sketch_key(s, n, side) for s in (0, 1, -1) for n in ("a", "b", "a.b") for side in ("left", "right")}
    assert len(keys) == 18
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)
    assert {key < 0 for key in keys} == {True, False}


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    random_matrix(4, 9, 1, "gaussian")
    random_columns(torch.arange(9), 4, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_mode_leaves_nothing_behind():
    from gradmix.ops import counter_random

    counter_random._quantiles.cache_clear()
    with torch.inference_mode():
        random_matrix(4, 9, 1, "gaussian")
    weight = torch.ones(9, requires_grad=True)
    (random_matrix(4, 9, 1, "gaussian") @ weight).sum().backward()
    assert weight.grad is not None


BAD = {
    "no rank": (lambda: random_matrix(0, 3, 1), ValueError, "rank: got 0, expected at least 1"),
    "half a rank": (lambda: random_matrix(1.5, 3, 1), TypeError, "rank: got float, expected int"),
    "truth as a rank": (lambda: random_matrix(True, 3, 1), TypeError, "rank: got bool"),
    "negative columns": (lambda: random_matrix(1, -3, 1), ValueError, "dim: got -3, expected at least 0"),
    "float columns": (lambda: random_matrix(1, 3.0, 1), TypeError, "dim: got float"),
    "key too large": (lambda: random_matrix(1, 3, 1 << 63), ValueError, "key: got 9223372036854775808"),
    "text as a key": (lambda: random_matrix(1, 3, "a"), TypeError, "key: got str"),
    "unknown entries": (lambda: random_matrix(1, 3, 1, "uniform"), ValueError, "entries: got 'uniform'"),
    "integer dtype": (lambda: random_matrix(1, 3, 1, dtype=torch.int32), TypeError, "dtype: got torch.int32"),
    "list as index": (lambda: random_columns([1], 1, 1), TypeError, "index: got list, expected a tensor"),
    "float index": (lambda: random_columns(torch.ones(3), 1, 1), TypeError, "index: got dtype torch.float32"),
    "negative index": (lambda: random_columns(torch.tensor([2, -4]), 1, 1), ValueError, "index: got -4"),
    "columns of no rank": (lambda: random_columns(torch.tensor([2]), 0, 1), ValueError, "rank: got 0"),
    "float seed": (lambda: sketch_key(1.0, "a", "left"), TypeError, "seed: got float, expected int"),
    "truth as a seed": (lambda: sketch_key(True, "a", "left"), TypeError, "seed: got bool"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
