"""The replay buffer: what it holds, against slow and plain statements of the same; what it promises about state."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch

from gradmix.replay.buffer import BufferSamples, ReplayBuffer
from gradmix.replay.ledger import quotas

POLICIES = ("class", "balanced", "reservoir")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device visible")],
    ),
]


def stream(rows: int, classes: int = 4, seed: int = 0, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose first entry is their own number, so that a row can be told wherever it turns up."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, width, generator=generator)
    x[:, 0] = torch.arange(rows)
    # Skewed: class 0 is common, the last one rare.
    y = (torch.rand(rows, generator=generator) ** 2 * classes).long()
    return x, y


def numbers(x: torch.Tensor) -> list[int]:
    return x[:, 0].long().tolist()


def fill(buffer: ReplayBuffer, x: torch.Tensor, y: torch.Tensor, sizes: list[int]) -> ReplayBuffer:
    assert sum(sizes) == len(y)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        buffer.add(part_x, part_y)
    return buffer


def poured(capacity: int, seen: list[int]) -> list[int]:
    """Equal shares, poured out one row after the other: to the class with the smallest share that has rows left."""
    share = [0] * len(seen)
    for _ in range(min(capacity, sum(seen))):
        open_classes = [c for c in range(len(seen)) if share[c] < seen[c]]
        share[min(open_classes, key=lambda c: (share[c], c))] += 1
    return share


# ------------------------------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 3, 7, 100, 1000])
def test_same_rows_in_same_order_whatever_the_split(policy, capacity, device):
    x, y = (t.to(device) for t in stream(100))
    whole = fill(ReplayBuffer(capacity, policy=policy, seed=5), x, y, [100])
    for sizes in ([1] * 100, [37, 0, 1, 62], [99, 1], [10] * 10):
        parts = fill(ReplayBuffer(capacity, policy=policy, seed=5), x, y, sizes)
        torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=0)
        assert parts.y.tolist() == whole.y.tolist()
        assert parts.seen_per_class == whole.seen_per_class
        assert torch.equal(
            parts.sample(4)[0], fill(ReplayBuffer(capacity, policy=policy, seed=5), x, y, [100]).sample(4)[0]
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_reading_between_calls_changes_nothing(policy):
    x, y = stream(200)
    unread = fill(ReplayBuffer(5, policy=policy), x, y, [20] * 10)
    read = ReplayBuffer(5, policy=policy)
    for part_x, part_y in zip(x.split(20), y.split(20), strict=True):
        read.add(part_x, part_y)
        held = numbers(read.x)
        assert held == sorted(held), "x stands in order of arrival"
        assert torch.equal(part_y.new_tensor([y[i] for i in held]), read.y), "labels stay with their rows"
        assert torch.equal(x[held], read.x)
        read.sample(3)
        read.draw_balanced(3)
    assert torch.equal(read.x, unread.x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 2, 5, 13, 40])
def test_holds_the_smallest_keys_within_the_quota(policy, capacity):
    x, y = stream(150, classes=5)
    buffer = fill(ReplayBuffer(capacity, policy=policy, seed=3), x, y, [50, 1, 99])
    # A buffer too large to turn anything away shows the keys that belong to this seed.
    keys = fill(ReplayBuffer(150, policy="reservoir", seed=3), x, y, [150]).state_dict()["keys"].tolist()
    if policy == "reservoir":
        expected = sorted(sorted(range(150), key=keys.__getitem__)[:capacity])
    else:
        seen = torch.bincount(y, minlength=5).tolist()
        quota = [min(capacity, n) for n in seen] if policy == "class" else poured(capacity, seen)
        chosen = []
        for label in range(5):
            rows = [i for i in range(150) if y[i] == label]
            chosen += sorted(rows, key=keys.__getitem__)[: quota[label]]
        expected = sorted(chosen)
    assert numbers(buffer.x) == expected


QUOTAS = {
    "one class": (5, [9]),
    "fewer seen than capacity": (50, [3, 4, 5]),
    "exactly full": (12, [3, 4, 5]),
    "remainder": (10, [100, 100, 100]),
    "small class leaves its rest": (30, [2, 100, 100]),
    "two small ones": (31, [1, 3, 100, 100]),
    "level equal to a count": (9, [3, 3, 100]),
    "more classes than room": (3, [5, 5, 5, 5, 5]),
    "class seen never": (6, [0, 10, 10]),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_balancedquotas(case):
    capacity, seen = QUOTAS[case]
    quota = quotas("balanced", capacity, torch.tensor(seen)).tolist()
    assert quota == poured(capacity, seen)
    assert sum(quota) == min(capacity, sum(seen))


def test_balanced_quotas_of_random_counts():
    generator = np.random.default_rng(0)
    for _ in range(200):
        seen = generator.integers(0, 30, size=generator.integers(1, 9)).tolist()
        capacity = int(generator.integers(1, 120))
        assert quotas("balanced", capacity, torch.tensor(seen)).tolist() == poured(capacity, seen)


@pytest.mark.parametrize("policy", ["balanced", "reservoir"])
def test_total_policies_are_full_as_soon_as_possible(policy):
    buffer, total = ReplayBuffer(20, policy=policy), 0
    # Classes one after the other, the first of them rare: room taken by later classes must never stand empty.
    for label, rows in enumerate([3, 50, 1, 40, 40]):
        buffer.add(torch.zeros(rows, 1), torch.full((rows,), label))
        total += rows
        assert len(buffer) == min(20, total)
    if policy == "balanced":
        assert buffer.class_counts() == {0: 3, 1: 6, 2: 1, 3: 5, 4: 5}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_is_held_equally_often(policy):
    y = torch.tensor([0] * 12 + [1] * 12)
    x = torch.arange(24.0).unsqueeze(1)
    held, trials = torch.zeros(24), 1000
    for seed in range(trials):
        buffer = ReplayBuffer(3 if policy == "class" else 6, policy=policy, seed=seed)
        buffer.add(x[:10], y[:10])
        buffer.add(x[10:], y[10:])
        held[buffer.x[:, 0].long()] += 1
    # Binomial with p = 1/4: five standard deviations are never passed by chance.
    assert (held / trials - 0.25).abs().max() < 5 * (0.25 * 0.75 / trials) ** 0.5


def test_held_rows_of_two_buffers_with_one_seed_agree_and_with_two_seeds_differ():
    x, y = stream(300)
    first, again, other = (fill(ReplayBuffer(20, seed=s), x, y, [300]) for s in (1, 1, 2))
    assert numbers(first.x) == numbers(again.x) != numbers(other.x)


def test_keys_are_not_those_of_a_generator_with_the_same_seed():
    buffer = fill(ReplayBuffer(100, seed=7), *stream(10), [10])
    same_seed = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(buffer.state_dict()["keys"], same_seed)


def test_counts():
    buffer = ReplayBuffer(2)
    buffer.add(torch.zeros(5, 2), torch.tensor([4, 4, 4, 1, 4]))
    buffer.add(torch.zeros(1, 2), torch.tensor([9]))
    assert (len(buffer), buffer.seen, buffer.classes) == (4, 6, (1, 4, 9))
    assert buffer.class_counts() == {1: 1, 4: 2, 9: 1}
    assert buffer.seen_per_class == {1: 1, 4: 4, 9: 1}
    assert "held=4, seen=6, classes=3" in repr(buffer)


def test_a_class_may_be_seen_but_not_held():
    buffer = ReplayBuffer(2, policy="balanced")
    buffer.add(torch.zeros(9, 1), torch.tensor([0, 1, 2] * 3))
    assert buffer.classes == (0, 1)
    assert buffer.seen_per_class == {0: 3, 1: 3, 2: 3}


# ---------------------------------------------------------------------------------------------------- awkward inputs


ROWS = {
    "one row": (torch.ones(1, 4), torch.tensor([3])),
    "rows without dimensions": (torch.arange(6.0), torch.tensor([0, 1, 0, 1, 0, 1])),
    "images": (torch.rand(5, 3, 4, 4), torch.arange(5)),
    "uint8": (torch.arange(12, dtype=torch.uint8).reshape(6, 2), torch.arange(6)),
    "bool": (torch.tensor([[True], [False], [True]]), torch.zeros(3, dtype=torch.int64)),
    "bfloat16": (torch.rand(6, 2).bfloat16(), torch.arange(6)),
    "float64": (torch.rand(6, 2, dtype=torch.float64), torch.arange(6)),
    "transposed": (torch.rand(4, 7).t(), torch.arange(7)),
    "strided": (torch.rand(14, 4)[::2, 1:3], torch.arange(14)[::2]),
    "channels last": (torch.rand(3, 2, 5, 5).to(memory_format=torch.channels_last), torch.arange(3)),
    "int32 labels": (torch.rand(3, 2), torch.arange(3, dtype=torch.int32)),
    "large labels": (torch.rand(2, 2), torch.tensor([2**40, 0])),
    "rows of no values": (torch.empty(3, 0), torch.arange(3)),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", ROWS)
def test_rows_come_back_as_they_went_in(case, policy):
    x, y = ROWS[case]
    buffer = ReplayBuffer(50, policy=policy)
    buffer.add(x, y)
    assert torch.equal(buffer.x, x) and buffer.x.dtype == x.dtype
    assert buffer.y.tolist() == y.tolist() and buffer.y.dtype == torch.int64
    drawn_x, drawn_y = buffer.sample(len(y))
    assert drawn_x.shape == x.shape and sorted(drawn_y.tolist()) == sorted(y.tolist())


def test_empty_buffer_and_empty_rows():
    buffer = ReplayBuffer(4)
    assert (len(buffer), buffer.seen, buffer.classes, buffer.class_counts()) == (0, 0, (), {})
    assert buffer.x.shape == (0,) and buffer.y.shape == (0,) and buffer.y.dtype == torch.int64
    buffer.add(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert buffer.x.shape == (0, 5) and len(buffer) == 0
    assert buffer.sample(0)[0].shape == (0, 5) and buffer.draw_balanced(0)[1].shape == (0,)
    with pytest.raises(ValueError, match=r"x: got samples of shape \(6,\), expected \(5,\)"):
        buffer.add(torch.zeros(1, 6), torch.tensor([0]))


def test_keeps_detached_copies():
    x = torch.rand(6, 2, requires_grad=True)
    y = torch.arange(6)
    buffer = ReplayBuffer(10)
    buffer.add(x, y)
    before = buffer.x.clone()
    assert not buffer.x.requires_grad
    with torch.no_grad():
        x.zero_()
        y.zero_()
    assert torch.equal(buffer.x, before) and buffer.y.tolist() == list(range(6))
    drawn, _ = buffer.sample(3)
    drawn.zero_()
    assert torch.equal(buffer.x, before)


def test_only_kept_rows_are_copied():
    # 40 GB if anybody laid these rows out; the buffer may touch no more than the four rows it keeps.
    rows = 1_000_000
    x = torch.zeros(1, 10_000).expand(rows, 10_000)
    buffer = ReplayBuffer(4, policy="reservoir")
    buffer.add(x, torch.zeros(rows, dtype=torch.int64))
    assert buffer.x.shape == (4, 10_000) and buffer.seen == rows


def test_storage_grows_by_need():
    large = ReplayBuffer(10**9, policy="reservoir")
    large.add(torch.zeros(3, 1000), torch.arange(3))
    assert large.x.untyped_storage().nbytes() <= 2 * 3 * 1000 * 4
    total = fill(ReplayBuffer(10, policy="reservoir"), *stream(10), [6, 4])
    assert total.x.untyped_storage().nbytes() == 10 * 3 * 4


BAD_ROWS = {
    "x is a list": ([[1.0]], torch.tensor([0]), TypeError, r"x\[0\]\[0\]: got float"),
    "y is a list": (torch.ones(1, 1), [0], TypeError, "y: got list"),
    "x without dimensions": (torch.tensor(1.0), torch.tensor(0), ValueError, "x: got a tensor without dimensions"),
    "lengths differ": (torch.ones(2, 1), torch.tensor([0]), ValueError, r"y: got shape \(1,\), expected \(2,\)"),
    "soft labels": (torch.ones(2, 1), torch.ones(2, 4), ValueError, r"y: got shape \(2, 4\)"),
    "float labels": (torch.ones(2, 1), torch.ones(2), TypeError, "y: got dtype torch.float32"),
    "bool labels": (torch.ones(1, 1), torch.tensor([True]), TypeError, "y: got dtype torch.bool"),
    "negative label": (torch.ones(2, 1), torch.tensor([0, -100]), ValueError, "y: got label -100"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_and_leave_no_trace(case):
    x, y, error, message = BAD_ROWS[case]
    buffer = ReplayBuffer(4)
    with pytest.raises(error, match=message):
        buffer.add(x, y)
    assert buffer.seen == 0
    buffer.add(torch.ones(3, 2, 2), torch.arange(3))
    twin = fill(ReplayBuffer(4), torch.ones(3, 2, 2), torch.arange(3), [3])
    with pytest.raises((TypeError, ValueError)):
        buffer.add(x, y)
    assert torch.equal(buffer.state_dict()["key_generator"], twin.state_dict()["key_generator"])


def test_rows_of_another_shape_or_dtype_are_refused():
    buffer = fill(ReplayBuffer(4), torch.ones(3, 2), torch.arange(3), [3])
    with pytest.raises(ValueError, match=r"x: got samples of shape \(3,\), expected \(2,\)"):
        buffer.add(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"x: got dtype torch\.float64, expected torch\.float32"):
        buffer.add(torch.ones(1, 2, dtype=torch.float64), torch.tensor([0]))


BAD_ARGUMENTS = {
    "capacity 0": ({"capacity": 0}, ValueError, "capacity: got 0, expected at least 1"),
    "capacity float": ({"capacity": 2.0}, TypeError, "capacity: got 2.0"),
    "capacity bool": ({"capacity": True}, TypeError, "capacity: got True"),
    "policy": ({"capacity": 1, "policy": "ring"}, ValueError, "policy: got 'ring', expected one of 'class'"),
    "seed": ({"capacity": 1, "seed": None}, TypeError, "seed: got None"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    arguments, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        ReplayBuffer(**arguments)


@pytest.mark.parametrize("draw", ["sample", "draw_balanced"])
def test_bad_draws(draw):
    buffer = ReplayBuffer(2)
    with pytest.raises(ValueError, match="the buffer is empty"):
        getattr(buffer, draw)(1)
    buffer.add(torch.ones(2, 1), torch.arange(2))
    with pytest.raises(ValueError, match="n: got -1"):
        getattr(buffer, draw)(-1)
    with pytest.raises(TypeError, match=r"n: got 1\.5"):
        getattr(buffer, draw)(1.5)


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("device", DEVICES)
def test_sample_without_then_with_replacement(device):
    x, y = stream(40)
    buffer = fill(ReplayBuffer(40, policy="reservoir", device=device), x, y, [40])
    for n in (0, 1, 17, 40):
        drawn_x, drawn_y = buffer.sample(n)
        assert drawn_x.device == buffer.x.device and drawn_x.device.type == device
        rows = numbers(drawn_x)
        assert len(set(rows)) == n and drawn_y.tolist() == y[rows].tolist()
    rows = numbers(buffer.sample(400)[0])
    assert len(rows) == 400 and len(set(rows)) == 40


def test_sample_is_uniform():
    buffer = fill(ReplayBuffer(10, policy="reservoir"), torch.arange(10.0).unsqueeze(1), torch.arange(10), [10])
    counts, trials = torch.zeros(10), 2000
    for _ in range(trials):
        counts[buffer.sample(3)[1]] += 1
    assert (counts / trials - 0.3).abs().max() < 5 * (0.3 * 0.7 / trials) ** 0.5


@pytest.mark.parametrize("draw", ["sample", "draw_balanced"])
def test_a_generator_given_settles_the_draw_and_spares_the_buffers_own(draw):
    buffer, twin = (fill(ReplayBuffer(40), *stream(40), [40]) for _ in range(2))
    first, again = (getattr(buffer, draw)(9, generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(getattr(buffer, draw)(9)[0], getattr(twin, draw)(9)[0])
    assert not torch.equal(getattr(buffer, draw)(9)[0], first)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 100])
def test_balanced_draw_shares_out_rows_and_repeats_as_little_as_it_can(n):
    y = torch.tensor([0] * 30 + [3] * 2 + [8])
    buffer = fill(ReplayBuffer(33, policy="reservoir"), torch.arange(33.0).unsqueeze(1), y, [33])
    drawn_x, drawn_y = buffer.draw_balanced(n)
    assert y[numbers(drawn_x)].tolist() == drawn_y.tolist()
    shares = torch.bincount(drawn_y, minlength=9)[[0, 3, 8]]
    assert shares.max() - shares.min() <= 1 and shares.sum() == n
    for label, held, share in zip((0, 3, 8), (30, 2, 1), shares.tolist(), strict=True):
        times = torch.bincount(torch.tensor(numbers(drawn_x[drawn_y == label]), dtype=torch.int64), minlength=33)
        times = times[y == label]
        assert times.max() == -(-share // held) and times.min() == share // held


def test_balanced_draw_favours_no_class_and_no_place():
    buffer = fill(ReplayBuffer(12), torch.zeros(12, 1), torch.tensor([0] * 8 + [1] * 3 + [2]), [12])
    first, trials = torch.zeros(3), 2000
    for _ in range(trials):
        first[buffer.draw_balanced(4)[1][0]] += 1
    assert (first / trials - 1 / 3).abs().max() < 5 * (2 / 9 / trials) ** 0.5


def test_global_random_state_is_untouched():
    torch.manual_seed(3)
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    buffer = fill(ReplayBuffer(10), *stream(50), [25, 25])
    buffer.sample(5)
    buffer.sample(500)
    buffer.draw_balanced(5)
    ReplayBuffer(10).load_state_dict(buffer.state_dict())
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# ---------------------------------------------------------------------------------------------------- extra columns


def extras_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns of several shapes and dtypes that tell which row they belong to."""
    number = x[:, 0]
    return {
        "logits": number[:, None] * torch.arange(1.0, 4.0, device=x.device),
        "index": number.long(),
        "mask": (number.long() % 2 == 0)[:, None, None].expand(-1, 2, 2),
        "half": number.to(torch.bfloat16)[:, None],
        "nothing": number.new_empty(len(x), 0),
    }


def assert_extras(rows: BufferSamples | ReplayBuffer) -> None:
    expected = extras_of(rows.x)
    assert list(rows.extras) == list(expected)
    for name, value in rows.extras.items():
        assert value.dtype == expected[name].dtype and value.device == rows.x.device and not value.requires_grad
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 4, 23, 500])
def test_extras_follow_their_rows(policy, capacity, device):
    x, y = (t.to(device) for t in stream(150))
    plain = ReplayBuffer(capacity, policy=policy, seed=5)
    kept = ReplayBuffer(capacity, policy=policy, seed=5)
    for part_x, part_y in zip(x.split([1, 0, 80, 3, 66]), y.split([1, 0, 80, 3, 66]), strict=True):
        plain.add(part_x, part_y)
        kept.add(part_x, part_y, **extras_of(part_x))
        rows = kept.sample_with_extras(5)  # before the rows are put in order
        assert_extras(rows)
        assert torch.equal(rows.x, plain.sample(5)[0])
        assert_extras(kept)
        assert torch.equal(kept.x, plain.x) and torch.equal(kept.y, plain.y), "extras change nothing else"
        assert torch.equal(kept.draw_balanced(3)[0], plain.draw_balanced(3)[0])
    assert plain.extras == {}


@pytest.mark.parametrize("n", [0, 1, 6, 30, 31, 200])
def test_sample_with_extras_draws_as_sample_does(n):
    x, y = stream(90)
    buffer, twin = (fill(ReplayBuffer(30, policy="reservoir", seed=1), x, y, [90]) for _ in range(2))
    for generator in (None, torch.Generator().manual_seed(4)):
        rows = buffer.sample_with_extras(n, None if generator is None else torch.Generator().manual_seed(4))
        drawn_x, drawn_y = twin.sample(n, generator)
        assert isinstance(rows, BufferSamples) and rows.extras == {}
        assert torch.equal(rows.x, drawn_x) and torch.equal(rows.y, drawn_y)
    assert torch.equal(buffer.state_dict()["draw_generator"], twin.state_dict()["draw_generator"])


def test_rows_drawn_and_kept_are_copies_without_a_graph():
    x, y = stream(6)
    logits = torch.ones(6, 2, requires_grad=True)
    buffer = ReplayBuffer(6, policy="reservoir")
    buffer.add(x, y, logits=logits * 2)
    with torch.no_grad():
        logits.zero_()
    rows = buffer.sample_with_extras(6)
    assert not rows.extras["logits"].requires_grad
    rows.extras["logits"].zero_()
    assert torch.equal(buffer.extras["logits"], torch.full((6, 2), 2.0))


def test_an_empty_buffer_has_no_extras():
    buffer = ReplayBuffer(3)
    assert buffer.extras == {} and buffer.sample_with_extras(0).extras == {}
    buffer.add(torch.empty(0, 2), torch.empty(0, dtype=torch.int64), logits=torch.empty(0, 7))
    assert buffer.extras["logits"].shape == (0, 7) and buffer.sample_with_extras(0).extras["logits"].shape == (0, 7)
    with pytest.raises(ValueError, match="the buffer is empty"):
        buffer.sample_with_extras(1)
    with pytest.raises(ValueError, match="extras: got none, expected logits"):
        buffer.add(*stream(3, width=2))


BAD_EXTRAS = {
    "missing": ({}, ValueError, "extras: got none, expected index, logits as with the samples added before"),
    "one missing": ({"logits": torch.ones(3, 2)}, ValueError, "extras: got logits, expected index, logits"),
    "another": (
        {"logits": torch.ones(3, 2), "index": torch.ones(3).long(), "z": torch.ones(3)},
        ValueError,
        "extras: got index, logits, z, expected index, logits",
    ),
    "other rows": (
        {"logits": torch.ones(3, 4), "index": torch.ones(3).long()},
        ValueError,
        r"logits: got samples of shape \(4,\), expected \(2,\)",
    ),
    "other dtype": (
        {"logits": torch.ones(3, 2), "index": torch.ones(3)},
        TypeError,
        "index: got dtype torch.float32, expected torch.int64",
    ),
    "too few": (
        {"logits": torch.ones(2, 2), "index": torch.ones(3).long()},
        ValueError,
        r"logits: got shape \(2, 2\), expected \(3, ...\), an entry for every sample of x",
    ),
    "no dimensions": (
        {"logits": torch.tensor(1.0), "index": torch.ones(3).long()},
        ValueError,
        r"logits: got shape \(\), expected \(3, ...\)",
    ),
    "list": ({"logits": [1, 2, 3], "index": torch.ones(3).long()}, TypeError, "logits: got list, expected a torch.T"),
}


@pytest.mark.parametrize("case", BAD_EXTRAS)
def test_bad_extras_are_refused_and_leave_no_trace(case):
    extras, error, message = BAD_EXTRAS[case]
    x, y = stream(3)
    buffer = ReplayBuffer(4)
    buffer.add(x, y, logits=torch.ones(3, 2), index=torch.arange(3))
    before = buffer.state_dict()
    with pytest.raises(error, match=message):
        buffer.add(x, y, **extras)
    after = buffer.state_dict()
    assert buffer.seen == 3 and torch.equal(after["key_generator"], before["key_generator"])
    assert all(torch.equal(after["extras"][name], value) for name, value in before["extras"].items())


def test_extras_come_late_to_a_buffer_without():
    buffer = fill(ReplayBuffer(4), *stream(3), [3])
    with pytest.raises(ValueError, match="extras: got logits, expected none as with the samples added before"):
        buffer.add(*stream(3), logits=torch.ones(3, 2))


@pytest.mark.parametrize("policy", POLICIES)
def test_extras_go_on_identically_after_saving(policy):
    x, y = stream(120)
    whole, first = (ReplayBuffer(9, policy=policy, seed=2) for _ in range(2))
    for each in (whole, first):
        for part_x, part_y in zip(x[:60].split(7), y[:60].split(7), strict=True):
            each.add(part_x, part_y, **extras_of(part_x))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    # Into a buffer that held other rows, without extras: nothing of it may be left.
    loaded = fill(ReplayBuffer(9, policy=policy, seed=77), *stream(50, seed=9, width=5), [50])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for part_x, part_y in zip(x[60:].split(7), y[60:].split(7), strict=True):
        for each in (whole, loaded):
            each.add(part_x, part_y, **extras_of(part_x))
        rows, again = whole.sample_with_extras(5), loaded.sample_with_extras(5)
        assert_extras(again)
        assert torch.equal(rows.x, again.x)
        # The spare room of the two differs, and their rows lie in other places of it.
        assert torch.equal(whole.draw_balanced(4)[0], loaded.draw_balanced(4)[0])
    assert_extras(loaded)
    assert torch.equal(loaded.x, whole.x)


def test_a_state_of_version_1_has_no_extras():
    buffer = fill(ReplayBuffer(3), *stream(40), [40])
    state = buffer.state_dict()
    del state["extras"]
    state["version"] = 1
    loaded = ReplayBuffer(3, seed=9)
    loaded.load_state_dict(state)
    assert loaded.extras == {} and torch.equal(loaded.x, buffer.x)
    assert torch.equal(loaded.sample(4)[0], buffer.sample(4)[0])


# ------------------------------------------------------------------------------------------------- moving and saving


@pytest.mark.parametrize("policy", POLICIES)
def test_goes_on_identically_after_saving(policy):
    x, y = stream(120)
    buffer = fill(ReplayBuffer(9, policy=policy, seed=2), x[:60], y[:60], [20, 20, 20])
    buffer.sample(4)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    loaded = ReplayBuffer(9, policy=policy, seed=77)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.seen_per_class == buffer.seen_per_class
    for start in (60, 90):
        assert torch.equal(loaded.x, buffer.x) and torch.equal(loaded.y, buffer.y)
        assert torch.equal(loaded.sample(7)[0], buffer.sample(7)[0])
        assert torch.equal(loaded.draw_balanced(7)[0], buffer.draw_balanced(7)[0])
        for each in (loaded, buffer):
            each.add(x[start : start + 30], y[start : start + 30])
    assert torch.equal(loaded.x, buffer.x)


def test_state_of_an_empty_buffer():
    empty, loaded = ReplayBuffer(3, seed=1), fill(ReplayBuffer(3, seed=2), *stream(5), [5])
    loaded.load_state_dict(empty.state_dict())
    assert len(loaded) == 0 and loaded.seen == 0
    x, y = torch.rand(30, 2, 2), torch.zeros(30, dtype=torch.int64)
    empty.add(x, y)
    loaded.add(x, y)
    assert torch.equal(loaded.x, empty.x)


def test_state_is_a_copy_both_ways():
    buffer, loaded = fill(ReplayBuffer(3), *stream(9), [9]), ReplayBuffer(3)
    state = buffer.state_dict()
    loaded.load_state_dict(state)
    before = buffer.x.clone()
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(buffer.x, before) and torch.equal(loaded.x, before)


BAD_STATES = {
    "entry missing": (lambda s: s.pop("keys"), "state: lacks keys"),
    "other capacity": (lambda s: s.update(capacity=9), "state: has capacity 9, expected 3"),
    "other policy": (lambda s: s.update(policy="balanced"), "state: has policy 'balanced', expected 'class'"),
    "later version": (lambda s: s.update(version=99), "state: has version 99"),
    "not a tensor": (lambda s: s.update(y=[1, 2]), "state: y is a list"),
    "rows cut off": (lambda s: s.update(x=s["x"][:-1]), "do not belong together"),
    "keys of another dtype": (lambda s: s.update(keys=s["keys"].float()), "do not belong together"),
    "label never seen": (lambda s: s.update(y=s["y"] + 50), "do not belong to the labels"),
    "counts too small": (lambda s: s.update(seen_counts=s["seen_counts"] * 0), "do not fit the seen counts"),
    "extras no dict": (lambda s: s.update(extras=[torch.ones(4)]), "extras is not a dict of tensors"),
    "extras cut off": (lambda s: s.update(extras={"a": torch.ones(2)}), "extras is not a dict of tensors by name"),
    "extras of no rows": (lambda s: s.update(extras={"a": torch.tensor(1)}), "extras is not a dict of tensors"),
    "extra called y": (lambda s: s.update(extras={"y": s["y"]}), "extras holds x or y"),
    "generator": (lambda s: s.update(key_generator=torch.zeros(3)), "key_generator is not the state"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_and_change_nothing(case):
    spoil, message = BAD_STATES[case]
    state = fill(ReplayBuffer(3), *stream(40), [40]).state_dict()
    spoil(state)
    buffer = fill(ReplayBuffer(3, seed=5), *stream(30, seed=1), [30])
    before = buffer.state_dict()
    with pytest.raises(ValueError, match=message):
        buffer.load_state_dict(state)
    after = buffer.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, torch.Tensor) else after[k] == v for k, v in before.items())


@pytest.mark.parametrize("target", DEVICES)
def test_to_moves_rows_and_keeps_decisions(target):
    x, y = stream(80)
    stays, moves = ReplayBuffer(5, policy="balanced"), ReplayBuffer(5, policy="balanced")
    for each in (stays, moves):
        each.add(x[:40], y[:40], **extras_of(x[:40]))
    assert moves.to(target) is moves
    assert moves.device == torch.device(target) and moves.x.device.type == target
    for each in (stays, moves):
        each.add(x[40:], y[40:], **extras_of(x[40:]))  # rows may lie elsewhere than the buffer
        assert_extras(each)
    assert torch.equal(moves.x.cpu(), stays.x) and torch.equal(moves.y.cpu(), stays.y)


def test_device_named_before_the_first_rows():
    buffer = ReplayBuffer(2, device="cpu")
    assert buffer.device == torch.device("cpu") and ReplayBuffer(2).device is None
    assert buffer.to("meta").device == torch.device("meta")
    assert buffer.x.device.type == "meta"


def test_long_run_of_small_calls_keeps_every_promise_at_once():
    for policy, capacity in itertools.product(POLICIES, (1, 6)):
        buffer, count = ReplayBuffer(capacity, policy=policy), torch.zeros(6, dtype=torch.int64)
        x, y = stream(120, classes=6, seed=4)
        for start in range(0, 120, 3):
            buffer.add(x[start : start + 3], y[start : start + 3])
            count += torch.bincount(y[start : start + 3], minlength=6)
            rows = numbers(buffer.x)
            assert len(set(rows)) == len(rows) == len(buffer)
            assert torch.equal(buffer.x, x[rows]) and torch.equal(buffer.y, y[rows])
            if policy != "reservoir":
                seen = count.tolist()
                quota = [min(capacity, n) for n in seen] if policy == "class" else poured(capacity, seen)
                assert torch.bincount(buffer.y, minlength=6).tolist() == quota
