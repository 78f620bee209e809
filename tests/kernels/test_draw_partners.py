"""The operator draw_partners: its rule against counting, and the same integers from every body."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradmix.ops.draw_partners import OPERATOR, DrawnPartners, draw_partners

BODIES = [body.name for body in OPERATOR.backends if body.available() is None]
FAST = [name for name in BODIES if name != "reference"]
POLICIES = ["uniform", "best", "permute"]


def make(n=5, m=7, policy="uniform", own_rows=False, share=0.5, levels=3, nan=0.0, dtype=torch.float32, seed=0) -> dict:
    """Arguments: pairs allowed with probability ``share``, scores of few values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    m = n if own_rows else m
    score = torch.randint(levels, (n, m), generator=g).to(dtype) - 1
    score[torch.rand(n, m, generator=g) < nan] = math.nan
    drawn = torch.rand(n, generator=g, dtype=torch.float64)
    if policy == "permute":
        drawn = (drawn * m).long()
    allowed = torch.rand(n, m, generator=g) < share
    return {"allowed": allowed, "drawn": drawn, "policy": policy, "score": score, "own_rows": own_rows}


def assert_same(results: list[DrawnPartners]) -> None:
    for result in results:
        assert result.partner.dtype == torch.int64 and result.found.dtype == torch.bool
        assert torch.equal(result.partner, results[0].partner) and torch.equal(result.found, results[0].found)


CASES = {
    "plain": {},
    "own rows": {"own_rows": True},
    "one row": {"n": 1},
    "one row of its own": {"n": 1, "own_rows": True, "share": 1.0},
    "one column": {"m": 1},
    "no rows": {"n": 0},
    "everything allowed": {"share": 1.0},
    "nothing allowed": {"share": 0.0, "own_rows": True},
    "nothing allowed among others": {"share": 0.0},
    "rarely allowed": {"n": 9, "m": 129, "share": 0.01},
    "two blocks": {"n": 3, "m": 513},
    "several blocks": {"n": 3, "m": 4099, "share": 0.3},
    "some NaN": {"n": 17, "nan": 0.6},
    "nothing but NaN": {"nan": 1.0, "share": 1.0},
    "one score": {"levels": 1},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_body_gives_the_same_integers(case: str, policy: str) -> None:
    arguments = make(**CASES[case], policy=policy)
    before = {name: v.clone() for name, v in arguments.items() if isinstance(v, Tensor)}
    assert_same([draw_partners(**arguments, backend=name) for name in BODIES])
    assert all(torch.equal(torch.nan_to_num(arguments[k]), torch.nan_to_num(v)) for k, v in before.items())
    del arguments["score"]
    assert_same([draw_partners(**arguments, backend=name) for name in BODIES])
    width = arguments.pop("allowed").shape[1]
    assert_same([draw_partners(None, **arguments, partners=width, backend=name) for name in BODIES])


def test_more_rows_than_a_block_of_the_kernel() -> None:
    arguments = make(n=130, policy="permute", own_rows=True, share=0.7)
    assert_same([draw_partners(**arguments, backend=name) for name in BODIES])


@given(
    n=st.integers(0, 6),
    m=st.integers(1, 9),
    policy=st.sampled_from(POLICIES),
    own_rows=st.booleans(),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    levels=st.integers(1, 4),
    nan=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=60)
def test_any_rows(n, m, policy, own_rows, share, levels, nan, dtype, seed) -> None:
    arguments = make(n, m, policy, own_rows, share, levels, nan, dtype, seed)
    assert_same([draw_partners(**arguments, backend=name) for name in BODIES])


@pytest.mark.parametrize("backend", BODIES)
def test_each_allowed_column_has_its_share_of_the_unit_interval(backend: str) -> None:
    allowed = torch.tensor([[False, True, True, False, True]])
    drawn = torch.tensor(
        [0.0, 1 / 3 - 1e-9, 1 / 3 + 1e-9, 2 / 3 - 1e-9, 2 / 3 + 1e-9, math.nextafter(1.0, 0.0)], dtype=torch.float64
    )
    result = draw_partners(allowed.expand(6, 5).contiguous(), drawn, backend=backend)
    assert result.partner.tolist() == [1, 1, 2, 2, 4, 4] and result.found.all()


@pytest.mark.parametrize("backend", BODIES)
def test_what_each_policy_chooses(backend: str) -> None:
    allowed = torch.tensor([[True, True, True], [True, True, False], [False, True, False]])
    score = torch.tensor([[9.0, 2.0, 2.0], [1.0, 8.0, 9.0], [0.0, 9.0, 0.0]])
    low, high = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 0.9, dtype=torch.float64)

    def drawn(numbers: Tensor, **kwargs: object) -> list[int]:
        return draw_partners(allowed, numbers, score=score, backend=backend, **kwargs).partner.tolist()

    assert drawn(low) == [0, 0, 1] and drawn(high) == [2, 1, 1]
    assert drawn(low, own_rows=True) == [1, 0, 1] and drawn(high, own_rows=True) == [2, 0, 1]
    assert drawn(high, policy="best") == [0, 1, 1]
    # Without its own column, the first row has two columns of its largest score.
    assert drawn(low, policy="best", own_rows=True) == [1, 0, 1] and drawn(high, policy="best", own_rows=True)[0] == 2
    columns = torch.tensor([0, 2, 1])
    kept = draw_partners(allowed, columns, policy="permute", backend=backend)
    assert kept.partner.tolist() == [0, 0, 1] and kept.found.tolist() == [True, False, True]
    kept = draw_partners(allowed, columns, policy="permute", own_rows=True, backend=backend)
    assert kept.partner.tolist() == [0, 1, 1] and kept.found.tolist() == [False, False, True]


@pytest.mark.parametrize("backend", BODIES)
def test_a_nan_is_never_the_best_and_minus_infinity_may_be(backend: str) -> None:
    score = torch.tensor([[math.nan, 1.0, 3.0], [-math.inf, math.nan, math.nan], [math.nan] * 3])
    allowed = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    result = draw_partners(allowed, torch.zeros(3, dtype=torch.float64), policy="best", score=score, backend=backend)
    assert result.partner.tolist() == [1, 0, 0] and result.found.tolist() == [True, True, False]


@pytest.mark.parametrize("backend", BODIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_strided_matrices_give_the_same(policy: str, backend: str) -> None:
    arguments = make(n=6, m=9, policy=policy, nan=0.2)
    expected = draw_partners(**arguments, backend=backend)
    for turned in (
        lambda v: v.T.contiguous().T,
        lambda v: torch.stack([v, v], -1)[..., 0],
        lambda v: torch.cat([v, v], -1)[..., : v.shape[-1]],
    ):
        strided = {k: turned(v) if k in ("allowed", "score") else v for k, v in arguments.items()}
        assert not strided["allowed"].is_contiguous()
        assert_same([expected, draw_partners(**strided, backend=backend)])


@pytest.mark.parametrize("backend", FAST)
def test_numbers_out_of_range_choose_no_column_that_is_not_there(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at, as on a GPU: here the check is taken away."""
    monkeypatch.setattr("gradmix.ops.draw_partners._check_range", lambda *_: None)
    allowed = torch.tensor([[False, True, True]]).expand(2, 3)
    numbers = torch.tensor([-0.5, 7.0], dtype=torch.float64)
    assert draw_partners(allowed, numbers, backend=backend).partner.tolist() == [1, 2]
    columns = torch.tensor([-1, 3])
    for mask in (allowed, None):
        result = draw_partners(mask, columns, policy="permute", partners=3, backend=backend)
        assert result.partner.tolist() == [0, 0] and not result.found.any()


def test_every_block_of_the_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("gradmix.kernels.draw_partners", reason="triton is not installed")
    if "triton" not in BODIES:
        pytest.skip("no Triton kernel can run here")
    for policy in ("uniform", "best"):
        arguments = make(n=4, m=700, policy=policy, own_rows=False, share=0.2)
        expected = draw_partners(**arguments, backend="torch")
        for configuration in ((64, 1), *kernel.CONFIGURATIONS):
            monkeypatch.setattr(kernel, "configuration", lambda partners, chosen=configuration: chosen)
            assert_same([expected, draw_partners(**arguments, backend="triton")])


ROWS = torch.zeros(5, dtype=torch.float64)
MASK = torch.ones(5, 7, dtype=torch.bool)
BAD = {
    "policy": ((MASK, ROWS), {"policy": "worst"}, ValueError, "policy: got 'worst', expected"),
    "drawn not a tensor": ((MASK, [0.5]), {}, TypeError, "drawn: got list"),
    "drawn of two dimensions": ((MASK, ROWS[None]), {}, ValueError, r"drawn: got shape \(1, 5\)"),
    "drawn in float32": ((MASK, ROWS.float()), {}, TypeError, "drawn: got dtype torch.float32, expected torch.float64"),
    "columns as floats": ((MASK, ROWS), {"policy": "permute"}, TypeError, "drawn: .* expected torch.int64"),
    "a number of 1": ((MASK, ROWS + 1), {}, ValueError, r"drawn: row 0 is 1.0, expected a number in \[0, 1\)"),
    "a number that is NaN": ((MASK, ROWS * math.nan), {}, ValueError, "drawn: row 0 is nan"),
    "a column too far": ((MASK, ROWS.long() + 7), {"policy": "permute"}, ValueError, r"row 0 is 7, .* in \[0, 7\)"),
    "allowed a list": (([[True]], ROWS), {}, TypeError, "allowed: got list"),
    "allowed as numbers": ((MASK.int(), ROWS), {}, TypeError, "allowed: got dtype torch.int32, expected bool"),
    "allowed of other rows": ((MASK[:4], ROWS), {}, ValueError, r"allowed: got shape \(4, 7\), expected \(5, M\)"),
    "columns that are not the rows": ((MASK, ROWS), {"own_rows": True}, ValueError, r"allowed: .* expected \(5, 5\)"),
    "score of other columns": ((MASK, ROWS), {"score": torch.ones(5, 6)}, ValueError, r"score: .* expected \(5, 7\)"),
    "score as integers": ((MASK, ROWS), {"score": MASK.long()}, TypeError, "score: got dtype torch.int64"),
    "how many columns": ((None, ROWS), {}, ValueError, "partners: got None"),
    "columns as a string": ((None, ROWS), {"partners": "7"}, TypeError, "partners: got str"),
    "fewer than no columns": ((None, ROWS), {"partners": -1}, ValueError, "partners: got -1"),
    "columns against rows": (
        (None, ROWS),
        {"partners": 7, "own_rows": True},
        ValueError,
        "partners: got 7, expected 5",
    ),
    "backend": ((MASK, ROWS), {"backend": "cuda"}, ValueError, "draw_partners has no 'cuda' body"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_named(case: str) -> None:
    arguments, named, error, message = BAD[case]
    with pytest.raises(error, match=message):
        draw_partners(*arguments, **named)


@pytest.mark.parametrize("policy", POLICIES)
def test_registration(policy: str) -> None:
    v = make(policy=policy)
    operator = torch.ops.gradmix.draw_partners.default
    torch.library.opcheck(operator, (v["allowed"], v["drawn"], v["score"], 7, policy, False, "torch"))
    torch.library.opcheck(operator, (None, v["drawn"], None, 5, policy, True, "torch"))


def test_torch_compile_passes_through_without_a_graph_break() -> None:
    v = make()

    def partners(allowed: Tensor, drawn: Tensor) -> Tensor:
        return draw_partners(allowed, drawn).partner + 1

    compiled = torch.compile(partners, fullgraph=True, backend="eager")
    assert torch.equal(compiled(v["allowed"], v["drawn"]), partners(v["allowed"], v["drawn"]))


def test_auto_leaves_a_kernel_that_is_not_measured_alone() -> None:
    v = make()
    expected = "torch" if "cpp" not in BODIES else "cpp"
    assert OPERATOR.choose("auto", v["allowed"], v["drawn"], None, 7, "uniform", False).name == expected
