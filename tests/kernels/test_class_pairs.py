"""class_pair_alignment: all bodies against means of float64 pairs."""

import math
from functools import cache
from itertools import product

import pytest
import torch
from test_mixed_alignment import in_double, make
from thinning import part
from torch import Tensor

from gradmix import kernels
from gradmix.ops.class_pairs import OPERATOR, class_pair_alignment, layout
from gradmix.ops.mixed_alignment import Side, mixed_alignment_reference

BODIES = [b.name for b in OPERATOR.backends if b.name != "reference"]
LAMS = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

CASES = {
    "plain": ([0, 1, 1, 2, 0, 2, 2], 3),
    "one row": ([0], 1),
    "a class without rows, one with a single row": ([0, 3, 3, 0, 4, 3], 5),
    "one class of many rows": ([1] * 19 + [0, 2], 3),
    "one row a class": ([4, 2, 0, 1, 3], 5),
}


def rows(n: int, dtype: torch.dtype, soft: bool = False, scale: float = 1.0) -> list[Tensor]:
    arguments = make(n=n, m=1, classes=6, d=3, soft=(soft, soft), dtype=dtype, scale=scale)
    return [*arguments[:3], arguments[6]]


def truth(arguments: list[Tensor], index: Tensor, classes: int, lam: float) -> tuple[Tensor, Tensor]:
    h, z, y, reference = in_double(arguments)
    pairs = mixed_alignment_reference(Side(h, z, y), Side(h, z, y), reference, lam)
    found = torch.full((2, classes, classes), math.nan, dtype=torch.float64)
    for a in range(classes):
        for b in range(classes):
            chosen = (index == a)[:, None] & (index == b) & ~torch.eye(len(index), dtype=torch.bool)
            if chosen.any():
                found[0, a, b], found[1, a, b] = pairs.inner[chosen].mean(), pairs.norm[chosen].mean()
    return found[0], found[1]


@cache
def arguments_and_truths(
    case: str, dtype: torch.dtype, soft: bool, scale: float
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Rows, and what a body is to give for each mixing weight: a loop over pairs that takes longer than a body."""
    members, classes = CASES[case]
    arguments = rows(len(members), dtype, soft, scale)
    if dtype == torch.bfloat16:  # label vectors rounded to 8 bits need not sum to 1
        arguments[2] = arguments[2].float() if soft else arguments[2]
    return arguments, [truth(arguments, torch.tensor(members), classes, lam) for lam in LAMS.tolist()]


NUMBERS = [  # huge logits are float32 before anything is done with them
    (torch.float64, 1.0), (torch.float64, 1e4), (torch.float32, 1.0), (torch.float32, 1e4), (torch.bfloat16, 1.0)
]  # fmt: skip


@pytest.mark.parametrize(
    "backend, case, numbers, soft", part(product([*BODIES, "reference"], CASES, NUMBERS, (False, True)), 3), ids=str
)
def test_values(backend: str, case: str, numbers: tuple[torch.dtype, float], soft: bool) -> None:
    dtype, scale = numbers
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton body has no float64")
    if backend == "triton" and kernels.unavailable_reason():
        pytest.skip(str(kernels.unavailable_reason()))
    members, classes = CASES[case]
    index = torch.tensor(members)
    arguments, truths = arguments_and_truths(case, dtype, soft, scale)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    h, z, y, reference = (t.to(device) for t in arguments)
    result = class_pair_alignment(Side(h, z, y), index.to(device), classes, reference, LAMS.to(device), backend=backend)
    unit = 1e-11 if dtype == torch.float64 else 1e-5
    for k, expected in enumerate(truths):
        for value, exact in zip((result.inner[k], result.norm[k]), expected, strict=True):
            assert torch.equal(value.cpu().isnan(), exact.isnan())
            largest = exact.nan_to_num().abs().max().clamp(min=1e-3)
            assert (value.cpu().double() - exact).nan_to_num().abs().max() <= unit * largest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_has_one_slot_in_a_group_of_its_class(case: str) -> None:
    members, classes = CASES[case]
    index = torch.tensor(members)
    slots, group, groups = layout(index, torch.bincount(index, minlength=classes))
    assert len(slots) == group * len(groups) and group & (group - 1) == 0
    assert sorted(slots[slots >= 0].tolist()) == list(range(len(index)))
    of_slot = groups.repeat_interleave(group)
    assert torch.equal(of_slot[slots >= 0], index[slots[slots >= 0]])


def test_registration() -> None:
    h, z, y, reference = rows(5, torch.float32)
    index = torch.tensor([0, 1, 1, 0, 1])  # a class without pairs gives NaN, which equals nothing
    torch.library.opcheck(torch.ops.gradmix.class_pair_alignment.default, (h, z, y, index, 2, reference, LAMS, "torch"))


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.ones(5), ValueError, r"features: got shape \(5,\)"),
        (1, torch.ones(4, 6), ValueError, r"logits: got shape \(4, 6\)"),
        (2, torch.full((5,), 6), ValueError, "labels: row 0 is 6"),
        (3, torch.full((5,), 3), ValueError, r"index: row 0 is 3, expected a class index in \[0, 3\)"),
        (3, torch.full((5, 3), 1 / 3), TypeError, "index: got dtype torch.float32"),
        (5, torch.ones(6, 9), ValueError, r"reference: got shape \(6, 9\)"),
        (6, torch.tensor([0.5, 1.5]), ValueError, "lam: got 1.5"),
        (6, torch.ones(2, 2), ValueError, r"lam: got shape \(2, 2\)"),
    ],
)
def test_bad_input_is_named(place: int, value: Tensor, error: type[Exception], message: str) -> None:
    h, z, y, reference = rows(5, torch.float32)
    arguments: list = [h, z, y, torch.tensor([0, 1, 1, 0, 2]), 3, reference, LAMS]
    arguments[place] = value
    with pytest.raises(error, match=message):
        class_pair_alignment(Side(*arguments[:3]), *arguments[3:])


def test_the_tensors_are_taken_one_by_one_with_a_warning() -> None:
    h, z, y, reference = rows(5, torch.float32)
    index = torch.tensor([0, 1, 1, 0, 2])
    expected = class_pair_alignment(Side(h, z, y), index, 3, reference, LAMS).inner
    with pytest.warns(
        DeprecationWarning, match=r"\(features, logits, labels, \.\.\.\) is now class_pair_alignment\(Side"
    ):
        found = class_pair_alignment(h, z, y, index, 3, reference, LAMS).inner
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    with pytest.raises(TypeError, match="side: got list, expected a Side"):
        class_pair_alignment([h, z, y], index, 3, reference, LAMS)
