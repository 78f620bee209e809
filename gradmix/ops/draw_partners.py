"""One partner for each row, from the pairs that are allowed and numbers drawn beforehand.

Randomness comes in as an argument, so that the same draws give the same partners on every device and in every body. A
row with ``count`` allowed columns and a number u in [0, 1) takes the one of rank floor(u count), columns ascending; the
product is formed in float64. What is allowed is narrowed first: by the policy ``best`` to the row's largest score, and,
where rows and columns are the same rows, by leaving out each row's own column.

:func:`draw_partners_reference` says exactly this, row by row.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradmix import _extension
from gradmix.calibration.lookup import CalibratedWorth, Extent
from gradmix.ops import _triton
from gradmix.ops.backends import Backend, Operator
from gradmix.ops.capsules import as_capsules
from gradmix.ops.registration import register
from gradmix.runtime.deferred_checks import can_sync, check_samples

DrawPolicy = Literal["uniform", "best", "permute"]
POLICIES = get_args(DrawPolicy)


class DrawnPartners(NamedTuple):
    """Partners of rows.

    Attributes:
        partner: (N,) int64, a column; where there is none the row's own index, or 0 if columns are other rows.
        found: (N,) bool, whether there is one.
    """

    partner: Tensor
    found: Tensor


# ------------------------------------------------------------------------------------------------------------ reference


def draw_partners_reference(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, policy: str, own_rows: bool
) -> DrawnPartners:
    """The rule, row by row, on the CPU. Arguments and result as :func:`draw_partners`."""
    mask = None if allowed is None else allowed.tolist()
    scores = None if score is None else score.tolist()
    chosen, found = [], []
    for i, number in enumerate(drawn.tolist()):
        columns = [j for j in range(partners) if (mask is None or mask[i][j]) and not (own_rows and j == i)]
        if policy == "permute":
            columns = [j for j in columns if j == number]
            rank = 0
        else:
            if policy == "best" and scores is not None:
                ranked = [scores[i][j] for j in columns if not math.isnan(scores[i][j])]
                columns = [j for j in columns if ranked and scores[i][j] == max(ranked)]
            rank = min(math.floor(number * len(columns)), len(columns) - 1)
        found.append(bool(columns))
        chosen.append(columns[rank] if columns else i if own_rows else 0)
    device = drawn.device
    return DrawnPartners(
        torch.tensor(chosen, dtype=torch.int64, device=device), torch.tensor(found, dtype=torch.bool, device=device)
    )


# ---------------------------------------------------------------------------------------------------------------- torch


def draw_partners_torch(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, policy: str, own_rows: bool
) -> DrawnPartners:
    """Batched torch calls; nothing is waited for. Arguments and result as :func:`draw_partners`."""
    row = torch.arange(drawn.shape[0], device=drawn.device)
    nobody = row if own_rows else torch.zeros_like(row)
    if partners == 0:
        return DrawnPartners(nobody.clone(), torch.zeros_like(row, dtype=torch.bool))
    if policy == "permute":
        found = (drawn >= 0) & (drawn < partners)
        if allowed is not None:
            found &= allowed.gather(1, drawn.clamp(0, partners - 1)[:, None])[:, 0]
        if own_rows:
            found &= drawn != row
        return DrawnPartners(torch.where(found, drawn, nobody), found)
    ranked = score if policy == "best" else None
    if allowed is None and ranked is None:
        count = torch.full_like(row, partners - own_rows)
        rank = _rank(drawn, count)
        partner = rank + (rank >= row) if own_rows else rank
    else:
        allowed = _restrict(allowed, ranked, own_rows)
        running = allowed.cumsum(1, dtype=torch.int32)
        count = running[:, -1].long()
        rank = _rank(drawn, count)
        # The column of that rank is the first at which the running count exceeds it.
        partner = torch.searchsorted(running, (rank + 1).to(torch.int32)[:, None])[:, 0]
    found = count > 0
    return DrawnPartners(torch.where(found, partner, nobody), found)


def _rank(drawn: Tensor, count: Tensor) -> Tensor:
    """floor(u count), and within [0, count) whatever u is; 0 where count is 0."""
    return (drawn * count).long().clamp_(min=0).minimum((count - 1).clamp_(min=0))


def _restrict(allowed: Tensor | None, score: Tensor | None, own_rows: bool) -> Tensor:
    """Columns that may be drawn, (N, M) bool: not the diagonal and, given a score, each row's largest alone."""
    if score is not None:
        known = ~score.isnan()
        allowed = known if allowed is None else known.logical_and_(allowed)
    elif own_rows:
        assert allowed is not None
        allowed = allowed.clone()
    assert allowed is not None
    if own_rows:
        allowed.fill_diagonal_(False)
    if score is not None:
        ranked = score.masked_fill(~allowed, -math.inf)
        allowed.logical_and_(ranked == ranked.amax(1, keepdim=True))
    return allowed


# ------------------------------------------------------------------------------------------------------------------ cpp


def draw_partners_cpp(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, policy: str, own_rows: bool
) -> DrawnPartners:
    """The extension's body, for the CPU. Arguments and result as :func:`draw_partners`."""
    extension: Any = _extension.load()
    ranked = score if policy == "best" else None
    if ranked is not None and ranked.dtype != torch.float64:
        ranked = ranked.float()
    found = torch.empty_like(drawn, dtype=torch.uint8)
    partner = torch.empty_like(drawn, dtype=torch.int64)
    mask = None if allowed is None else allowed.contiguous().view(torch.uint8)
    largest = None if ranked is None else ranked.detach().contiguous()
    inputs = as_capsules(mask, largest, drawn.contiguous())
    extension.draw_partners(*inputs, partners, own_rows, *as_capsules(partner, found))
    return DrawnPartners(partner, found.view(torch.bool))


def _cpp_can_run(_allowed: Tensor | None, drawn: Tensor, *_rest: object) -> str | None:
    return None if drawn.device.type == "cpu" else f"it serves the CPU, and the tensors are on {drawn.device}"


# --------------------------------------------------------------------------------------------------------------- triton


def draw_partners_triton(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, policy: str, own_rows: bool
) -> DrawnPartners:
    """One launch, a program for each row. Arguments and result as :func:`draw_partners`."""
    from gradmix.kernels import draw_partners as kernel

    ranked = score if policy == "best" else None
    return DrawnPartners(*kernel.draw_partners(allowed, drawn, ranked, partners, policy == "permute", own_rows))


def _triton_can_run(allowed: Tensor | None, drawn: Tensor, *_args: Any) -> str | None:
    return _triton.device_reason(drawn.device)


TRITON_AXES = ("samples", "samples")


def _triton_extent(
    allowed: Tensor | None, drawn: Tensor, score: Tensor | None, partners: int, policy: str, _own_rows: bool
) -> Extent:
    ranks = policy == "best" and score is not None
    dtype = score.dtype if ranks and score is not None else torch.float32
    kind = policy if allowed is not None else f"{policy}, all allowed"
    return drawn.device, dtype, kind, drawn.shape[0], partners


# -------------------------------------------------------------------------------------------- dispatch and registration

OPERATOR = Operator(
    "draw_partners",
    (
        Backend(
            "triton",
            draw_partners_triton,
            can_run=_triton_can_run,
            worth=CalibratedWorth("draw_partners", "triton", TRITON_AXES, _triton_extent),
            available=_triton.unavailable_reason,
        ),
        Backend("cpp", draw_partners_cpp, can_run=_cpp_can_run, available=_extension.unavailable_reason),
        Backend("torch", draw_partners_torch),
        Backend("reference", draw_partners_reference),
    ),
)


def _fake(_allowed: Tensor | None, drawn: Tensor, *_rest: Any) -> DrawnPartners:
    return DrawnPartners(torch.empty_like(drawn, dtype=torch.int64), torch.empty_like(drawn, dtype=torch.bool))


draw_partners_op = register(
    OPERATOR,
    "(Tensor? allowed, Tensor drawn, Tensor? score, SymInt partners, str policy, bool own_rows, str backend) "
    "-> (Tensor, Tensor)",
    _fake,
)


def draw_partners(
    allowed: Tensor | None,
    drawn: Tensor,
    *,
    policy: DrawPolicy = "uniform",
    score: Tensor | None = None,
    own_rows: bool = False,
    partners: int | None = None,
    backend: str = "auto",
) -> DrawnPartners:
    """Draw a partner for each row among the columns it may be paired with, without waiting for the device.

    All bodies return the same integers. (The body ``reference`` reads the tensors on the CPU, and so it does wait.)

    Args:
        allowed: (N, M) bool, whether row i may be paired with column j; None: all may.
        drawn: (N,) what was drawn for each row: float64 in [0, 1), or for the policy ``permute`` int64 columns.
        policy: ``"uniform"``: any allowed column. ``"best"``: any of those of the row's largest score. ``"permute"``:
            the column drawn, if it is allowed.
        score: (N, M), any floating-point dtype, for ``best``: only allowed columns count, and a NaN never does, so that
            a row of nothing but NaN finds no partner. None: all equal. The other policies do not look at it.
        own_rows: the columns are the rows themselves (M = N), and no row is its own partner.
        partners: M, needed where neither ``allowed`` nor ``score`` nor ``own_rows`` tells.
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"torch"`` or ``"reference"``.

    Returns:
        :class:`DrawnPartners`: ``partner`` (N,) int64 and ``found`` (N,) bool.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown policy or backend; where values can be read without
            a wait (:mod:`gradmix.runtime.deferred_checks`) also a number drawn out of range. Elsewhere numbers are
            brought into range, and a column that does not exist is not allowed.
        RuntimeError: the backend named cannot run these tensors or is not available.

    >>> import torch
    >>> from gradmix.ops.draw_partners import draw_partners
    >>> allowed = torch.tensor([[True, False, True], [False, False, False]])
    >>> draw_partners(allowed, torch.tensor([0.7, 0.2], dtype=torch.float64))
    DrawnPartners(partner=tensor([2, 0]), found=tensor([ True, False]))
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, expected 'uniform', 'best' or 'permute'")
    expected = torch.int64 if policy == "permute" else torch.float64
    if not isinstance(drawn, Tensor):
        raise TypeError(f"drawn: got {type(drawn).__name__}, expected a tensor")
    if drawn.ndim != 1:
        raise ValueError(f"drawn: got shape {tuple(drawn.shape)}, expected (N,)")
    if drawn.dtype != expected:
        raise TypeError(f"drawn: got dtype {drawn.dtype}, expected {expected} for the policy {policy!r}")
    rows = drawn.shape[0]
    if partners is not None and (isinstance(partners, bool) or not isinstance(partners, (int, torch.SymInt))):
        raise TypeError(f"partners: got {type(partners).__name__}, expected an integer or None")
    if partners is not None and partners < 0:
        raise ValueError(f"partners: got {partners}, expected at least 0")
    if own_rows:
        if partners is not None and partners != rows:
            raise ValueError(f"partners: got {partners}, expected {rows}, the number of rows, with own_rows")
        partners = rows
    for name, value in (("allowed", allowed), ("score", score)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor or None")
        if value.ndim != 2 or value.shape[0] != rows or (partners is not None and value.shape[1] != partners):
            width = "M" if partners is None else partners
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({rows}, {width})")
        if value.device != drawn.device:
            raise ValueError(f"{name}: got a tensor on {value.device}, expected {drawn.device} as drawn")
        partners = value.shape[1]
    if allowed is not None and allowed.dtype != torch.bool:
        raise TypeError(f"allowed: got dtype {allowed.dtype}, expected bool")
    if score is not None and not score.is_floating_point():
        raise TypeError(f"score: got dtype {score.dtype}, expected a floating-point dtype")
    if partners is None:
        raise ValueError("partners: got None, expected the number of columns, which nothing else tells here")
    if can_sync(drawn.device) and not torch.compiler.is_compiling():
        _check_range(drawn, partners if policy == "permute" else None)
    return DrawnPartners(*draw_partners_op(allowed, drawn, score, partners, policy, own_rows, backend))


def _check_range(drawn: Tensor, partners: int | None) -> None:
    """Raise unless ``drawn`` is in [0, 1), or for ``partners`` columns one of them."""
    end = 1 if partners is None else partners
    what = "a number in [0, 1)" if partners is None else f"a column in [0, {partners})"
    check_samples(
        ~((drawn >= 0) & (drawn < end)),
        lambda row: ValueError(f"drawn: row {row} is {drawn[row].item()}, expected {what}"),
    )
