"""Frozen selections: what is chosen in every combination of settings, so that a rewrite can be held against it.

The record beside this file has each case's decisions, and digests of its real numbers, which other machines round
otherwise. Two versions on one machine are compared to the last bit::

    export PYTHONPATH=tests
    python tests/core/golden_selections.py save before.pt     # with the one version installed
    python tests/core/golden_selections.py compare before.pt  # with the other
    python tests/core/golden_selections.py record             # writes the record anew, after a change that is meant
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import CLASSES, MLP, rows
from torch import Tensor

import gradmix

RECORD = Path(__file__).with_suffix(".json")

N, M, KEPT = 7, 5, 12
"""Samples of a batch, of foreign candidates, and of the buffer."""

ESTIMATORS: dict[str, Any] = {
    "feature": "feature",
    "mixed": "mixed",
    "jvp": gradmix.JvpEstimator(),
    "sketch": gradmix.SketchEstimator(rank=4, errors=1.0, budget=6, mixtures_per_class_pair=2),
}
CRITERIA = ("sample", "class")
POLICIES = ("uniform", "permute", "best")
REFERENCES = ("buffer", "marked", "none marked", "empty")
CANDIDATES = ("own", "foreign")

Case = dict[str, Any]
"""Plain values and tensors by name."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return MLP()


def group_of_one() -> torch.distributed.ProcessGroup:
    """A process group with this process in it alone: what is exchanged goes the whole way."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    assert group is not None
    return group


def of_pairs(pairs: gradmix.Pairs) -> Case:
    x, y = pairs.mix()
    result = {name: getattr(pairs, name) for name in ("partner", "lam", "helpful", "alignment", "classes")}
    result |= {"x": x, "y": y, "allowed": pairs.by_pair(0.1)[0], "num_classes": pairs.num_classes}
    if pairs.screening is not None:
        result |= vars(pairs.screening)
    return result


def of_state(state: Any, name: str = "state") -> Iterator[tuple[str, Any]]:
    """The leaves of a state by dotted name."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from of_state(value, f"{name}.{key}")
    elif isinstance(state, (list, tuple)):
        yield name, torch.tensor(state)
    else:
        yield name, state


def buffer_and_batch(reference: str, seed: int, soft: bool = False) -> tuple[Any, tuple[Tensor, Tensor]]:
    batch = rows(N, seed, soft=soft)
    marks = {"marked": torch.arange(N) % 3 == 1, "none marked": torch.zeros(N, dtype=torch.bool)}
    if reference in marks:
        return marks[reference], batch
    return rows(0 if reference == "empty" else KEPT, seed + 1), batch


def selections(every: int = 1) -> Iterator[tuple[str, Case]]:
    """Of select_pairs."""
    grid = itertools.product(ESTIMATORS, CRITERIA, POLICIES, REFERENCES, CANDIDATES, (False, True))
    for seed, (estimator, criterion, policy, reference, candidates, grouped) in enumerate(grid):
        if seed % every or (grouped and (policy != "uniform" or candidates == "foreign")):
            continue
        buffer, batch = buffer_and_batch(reference, 3 * seed)
        pairs = gradmix.select_pairs(
            network(),
            buffer,
            batch,
            candidates=rows(M, 3 * seed + 2) if candidates == "foreign" else None,
            estimator=ESTIMATORS[estimator],
            criterion=criterion,
            policy=policy,
            chunk_size=4,
            generator=generator(seed),
            group=group_of_one() if grouped else None,
        )
        words = (estimator, criterion, policy, reference, candidates, *(["group"] if grouped else []))
        yield "select_pairs: " + ", ".join(words), of_pairs(pairs)


def other_settings(every: int = 1) -> Iterator[tuple[str, Case]]:
    """Label vectors, a weight and a threshold given, outputs and references made before."""
    for seed, (estimator, criterion, soft) in enumerate(itertools.product(ESTIMATORS, CRITERIA, (False, True)), 700):
        if seed % every:
            continue
        model = network()
        buffer, batch = buffer_and_batch("buffer", 3 * seed, soft)
        how: dict[str, Any] = {"estimator": ESTIMATORS[estimator], "criterion": criterion, "lam": 0.35}
        if estimator in ("feature", "mixed"):
            how["reference"] = gradmix.reference_gradient(model, buffer)
            with torch.no_grad(), gradmix.HeadCapture(model, "fc") as capture:
                model(batch[0])
            how["outputs"] = capture.output
        for threshold in (-0.2, 0.15):
            pairs = gradmix.select_pairs(model, buffer, batch, threshold=threshold, generator=generator(seed), **how)
            labels = "vectors" if soft else "indices"
            yield f"select_pairs: {estimator}, {criterion}, {labels}, threshold {threshold}", of_pairs(pairs)


def steps(every: int = 1) -> Iterator[tuple[str, Case]]:
    """Of GradMix over several calls, and the state that it leaves."""
    grid = itertools.product(ESTIMATORS, CRITERIA, POLICIES, (1, 2, "epoch"), ("buffer", "marked"), (False, True))
    for seed, (estimator, criterion, policy, refresh, reference, grouped) in enumerate(grid, 900):
        if seed % every or ((grouped or refresh == "epoch") and policy != "uniform"):
            continue
        model = network()
        kept: list[tuple[Tensor, Tensor]] = [rows(0, 0)]
        mixup = gradmix.GradMix(
            model,
            (lambda kept=kept: kept[0]) if reference == "buffer" else None,
            estimator=ESTIMATORS[estimator],
            criterion=criterion,
            policy=policy,
            refresh=refresh,
            class_samples=4,
            chunk_size=5,
            generator=generator(seed),
            group=group_of_one() if grouped else None,
        )
        words = (estimator, criterion, policy, f"refresh {refresh}", reference, *(["group"] if grouped else []))
        for call in range(4):
            x, y = rows(N, 10 * seed + call)
            y = y % (2 if call < 2 else CLASSES)  # classes that come later
            marks = torch.arange(N) % 3 == call % 3 if call else torch.zeros(N, dtype=torch.bool)
            foreign = rows(M, 10 * seed + 7) if call == 3 else None
            pairs = mixup.select(x, y, candidates=foreign, replayed=marks if reference == "marked" else None)
            name = "GradMix: " + ", ".join(words) + f", call {call}"
            yield name, of_pairs(pairs) | dict(of_state(mixup.state_dict())) | {"refreshes": mixup.refreshes}
            kept[0] = rows(KEPT, 10 * seed + 8)
            with torch.no_grad():
                model.fc.weight += 0.05


def matrices(every: int = 1) -> Iterator[tuple[str, Case]]:
    """Of alignment_matrix."""
    for seed, (estimator, criterion, candidates) in enumerate(
        itertools.product(ESTIMATORS, CRITERIA, CANDIDATES), 1500
    ):
        if seed % every:
            continue
        buffer, batch = buffer_and_batch("buffer", 3 * seed)
        alignment = gradmix.alignment_matrix(
            network(),
            buffer,
            batch,
            lam=0.4,
            candidates=rows(M, seed) if candidates == "foreign" else None,
            estimator=ESTIMATORS[estimator],
            criterion=criterion,
            chunk_size=4,
        )
        yield f"alignment_matrix: {estimator}, {criterion}, {candidates}", dict(vars(alignment))


def cases(every: int = 1) -> dict[str, Case]:
    """All of them by name, or each ``every``-th of those that the products of settings give."""
    parts = (selections, other_settings, steps, matrices)
    return dict(itertools.chain.from_iterable(part(every) for part in parts))


def digest(value: Any) -> Any:
    """Decisions and counts as they are; real numbers as their count of NaN, sum and weighted sum."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8:  # the state of a generator: what it draws next
        source = torch.Generator()
        source.set_state(value)
        return int(torch.randint(1 << 40, (1,), generator=source))
    if not value.is_floating_point():
        return value.int().tolist() if value.ndim < 2 else [list(value.shape), int(value.sum())]
    flat = value.double().flatten()
    known = flat.nan_to_num()
    places = torch.linspace(0.5, 1.5, len(flat), dtype=torch.float64)
    return [list(value.shape), int(flat.isnan().sum()), round(float(known.sum()), 6), round(float(known @ places), 6)]


def digests(found: dict[str, Case]) -> dict[str, Case]:
    """What the record holds of ``found``."""
    implied = {"x", "y", "num_classes"}  # by partners and weights
    return {
        name: {key: digest(value) for key, value in case.items() if key not in implied} for name, case in found.items()
    }


def written(record: dict[str, Case]) -> str:
    """The record as text, a line for each case."""
    lines = (f"{json.dumps(name)}: {json.dumps(case)}" for name, case in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def differences(found: dict[str, Case], before: dict[str, Case]) -> Iterator[str]:
    """What differs in any bit."""
    for name in sorted({*found, *before}):
        one, other = found.get(name, {}), before.get(name, {})
        for key in sorted({*one, *other}):
            a, b = one.get(key), other.get(key)
            same = (
                a.dtype == b.dtype
                and a.shape == b.shape
                and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
                if isinstance(a, Tensor) and isinstance(b, Tensor)
                else not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
            )
            if not same:
                yield f"{name}: {key}"


def main(command: str, path: str = "") -> int:
    torch.set_num_threads(1)
    found = cases()
    print(f"{len(found)} cases")
    if command == "save":
        torch.save(found, path)
    elif command == "record":
        RECORD.write_text(written(digests(found)))
    else:
        different = list(differences(found, torch.load(path)))
        print("\n".join([*different[:40], f"{len(different)} differences"]))
        return bool(different)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
