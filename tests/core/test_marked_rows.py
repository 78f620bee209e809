"""The batch's own replayed rows in place of a buffer: the same as passing these rows as the buffer."""

from typing import Any

import pytest
import torch
from graph_stand_in import install_graphs
from models import CLASSES, MLP, ConvNet, rows
from no_looking import behind_the_host
from torch import Tensor

import gradmix
from gradmix import GradMix, ReplayBuffer, select_pairs
from gradmix.labelled_samples import LabelledSamples
from gradmix.model.forward import forward_all
from gradmix.model.head import resolve_head
from gradmix.model.unchanged import leave_unchanged
from gradmix.references import gradient_of_marked
from gradmix.runtime import deferred_checks

MARKS = {"some": [1, 4, 5, 8], "one": [7], "none": [], "all": list(range(10))}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked(places: list[int], n: int = 10) -> Tensor:
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.tensor(places, dtype=torch.int64), True)


def those(batch: tuple[Tensor, Tensor], places: list[int]) -> tuple[Tensor, Tensor]:
    return batch[0][places], batch[1][places]


def assert_same(pairs: gradmix.Pairs, expected: gradmix.Pairs) -> None:
    assert torch.equal(pairs.partner, expected.partner)
    assert torch.equal(pairs.helpful, expected.helpful)
    assert torch.equal(pairs.lam, expected.lam)
    torch.testing.assert_close(pairs.alignment, expected.alignment, equal_nan=True)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("case", MARKS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_reference_is_that_of_the_marked_rows(case: str, bias: bool, soft: bool) -> None:
    model, batch = MLP(bias).double(), rows(10, 1, torch.float64, soft)
    with leave_unchanged(model):
        head = resolve_head(model, "fc")
        reference, nothing = gradient_of_marked(
            forward_all(model, head, "batch", LabelledSamples(*batch), 99), marked(MARKS[case])
        )
    assert bool(nothing) == (case == "none")
    if case == "none":
        assert not reference.any() and reference.shape == (CLASSES, 12 + bias)
    else:
        torch.testing.assert_close(reference, gradmix.reference_gradient(model, those(batch, MARKS[case])))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("policy", ["uniform", "permute", "best"])
@pytest.mark.parametrize("case", MARKS)
@pytest.mark.parametrize("estimator", ["feature", "mixed"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_it_selects_as_with_these_rows_for_a_buffer(
    criterion: str, estimator: str, case: str, policy: str, soft: bool
) -> None:
    model, batch = MLP(), rows(10, 1, soft=soft)
    how: dict[str, Any] = {"criterion": criterion, "estimator": estimator, "policy": policy, "threshold": 0.1}
    pairs = select_pairs(model, marked(MARKS[case]), batch, generator=generator(), **how)
    assert_same(pairs, select_pairs(model, those(batch, MARKS[case]), batch, generator=generator(), **how))
    assert case != "none" or (pairs.alignment == 0).all()


@pytest.mark.parametrize("case", MARKS)
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_over_all_parameters(estimator: str, case: str) -> None:
    model, batch = MLP(), rows(10, 1)
    pairs = select_pairs(model, marked(MARKS[case]), batch, estimator=estimator, generator=generator())
    expected = select_pairs(model, those(batch, MARKS[case]), batch, estimator=estimator, generator=generator())
    assert_same(pairs, expected)


def test_candidates_and_outputs_and_no_pass_but_the_batchs() -> None:
    model, batch, candidates = ConvNet(), rows(10, 1), rows(6, 2)
    sizes: list[int] = []
    model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    expected = select_pairs(model, those(batch, [1, 4]), batch, candidates=candidates, generator=generator(), head="fc")
    sizes.clear()
    pairs = select_pairs(model, marked([1, 4]), batch, candidates=candidates, generator=generator(), head="fc")
    assert_same(pairs, expected)
    assert sizes == [10, 6]
    with gradmix.HeadCapture(model.eval(), "fc") as capture, torch.no_grad():
        model(batch[0])
    sizes.clear()
    own = select_pairs(model, marked([1, 4]), batch, outputs=capture.output, generator=generator(), head="fc")
    assert sizes == []
    assert_same(own, select_pairs(model, those(batch, [1, 4]), batch, generator=generator(), head="fc"))


WRONG = {
    "another dtype": (torch.zeros(10), TypeError, "float32, expected bool"),
    "too few": (torch.zeros(9, dtype=torch.bool), ValueError, r"shape \(9,\), expected \(10,\)"),
    "two dimensions": (torch.zeros(10, 1, dtype=torch.bool), ValueError, r"expected \(10,\)"),
    "no tensor": ([True] * 10, TypeError, "got list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_marks_no_rows_is_refused(case: str) -> None:
    value, error, message = WRONG[case]
    mixup = GradMix(MLP(), None)
    with pytest.raises(error, match=f"replayed: .*{message}"):
        mixup.select(*rows(10, 1), replayed=value)
    if isinstance(value, Tensor):
        with pytest.raises(error, match=f"buffer: .*{message}"):
            select_pairs(MLP(), value, rows(10, 1))


# -------------------------------------------------------------------------------------------------------------- GradMix


def test_without_a_buffer_every_call_marks_its_rows() -> None:
    with pytest.raises(ValueError, match="replayed: got None"):
        GradMix(MLP(), None)(*rows(10, 1))
    x, y = GradMix(MLP(), None)(*rows(10, 1), replayed=marked([3, 4]))
    assert x.shape == (10, 3, 8, 8) and y.shape == (10, CLASSES)


@pytest.mark.parametrize("case", MARKS)
@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp"])
def test_by_sample_a_call_with_marks_leaves_what_is_kept_alone(estimator: str, case: str) -> None:
    model, batch, buffer = MLP(), rows(10, 1), ReplayBuffer(50)
    buffer.add(*rows(20, 3))
    mixup = GradMix(model, buffer, refresh="epoch", estimator=estimator, generator=generator())
    mixup.select(*batch)
    kept = mixup.reference
    mixup._generator = generator(5)
    pairs = mixup.select(*batch, replayed=marked(MARKS[case]))
    assert mixup.reference is kept and mixup.refreshes == 1
    expected = select_pairs(model, those(batch, MARKS[case]), batch, estimator=estimator, generator=generator(5))
    assert_same(pairs, expected)


@pytest.mark.parametrize("estimator", ["feature", "mixed", "jvp", "sketch"])
def test_by_class_the_table_is_made_of_the_rows_at_hand(estimator: str) -> None:
    model, batch = MLP(), rows(10, 1)
    how: dict[str, Any] = {"criterion": "class", "refresh": "epoch", "estimator": estimator}
    mixup = GradMix(model, None, generator=generator(), **how)
    mixup.select(*batch, replayed=marked([]))
    assert mixup.reference is None and mixup.pairs.helpful.all()
    mixup._generator = generator(5)
    mixup.select(*batch, lam=0.4, replayed=marked([1, 4, 5]))  # there was no reference: the first one is made
    known = GradMix(model, those(batch, [1, 4, 5]), generator=generator(5), **how)
    known.select(*batch, lam=0.4)
    torch.testing.assert_close(mixup.reference, known.reference)
    assert torch.equal(mixup.table.classes, batch[1].unique())
    first = mixup.table
    mixup.select(*batch, replayed=marked([2]))
    assert mixup.table is first
    mixup.start_epoch()
    mixup.select(*batch, replayed=marked([2]))
    assert mixup.table is not first
    if estimator == "feature":
        torch.testing.assert_close(mixup.reference, gradmix.reference_gradient(model, those(batch, [2])))


def test_by_class_a_first_marked_row_is_noticed_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    mixup = GradMix(MLP(), None, criterion="class", refresh="epoch", generator=generator())
    behind_the_host(monkeypatch)
    mixup.select(*rows(10, 1), replayed=marked([]))
    assert mixup.select(*rows(10, 1), replayed=marked([3])).helpful.all() and mixup.reference is None
    mixup.select(*rows(10, 1), replayed=marked([3]))  # told by the call before
    assert mixup.reference is not None and mixup.table is not None
    deferred_checks.raise_deferred()


def test_what_was_noticed_is_part_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    mixup, other = (
        GradMix(MLP(), None, criterion="class", refresh="epoch", generator=generator(seed)) for seed in (0, 1)
    )
    behind_the_host(monkeypatch)
    mixup.select(*rows(10, 1), replayed=marked([]))
    mixup.select(*rows(10, 1), replayed=marked([3]))
    other.load_state_dict(mixup.state_dict())
    other.select(*rows(10, 1), replayed=marked([3]))
    assert other.reference is not None and other.table is not None
    deferred_checks.raise_deferred()


@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_captured_calls_choose_the_same(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, captured = (
        GradMix(MLP(), None, criterion=criterion, threshold=0.3, generator=generator(), cuda_graph=graph)
        for graph in (False, True)
    )
    captured._model.load_state_dict(plain._model.state_dict())
    with install_graphs(monkeypatch) as recorder:
        for step, places in enumerate(([1, 2], [], [4], list(range(10)))):
            batch = rows(10, step)
            assert_same(captured.select(*batch, replayed=marked(places)), plain.select(*batch, replayed=marked(places)))
        deferred_checks.raise_deferred()
    assert recorder.replays > 0
