"""Models that mask classes by the task that a sample is of: mixtures of samples with different masks are of no head."""

import pytest
import torch
from torch import Tensor, nn

import gradmix


class MaskedByTask(nn.Module):
    """Classes 0 to 2 for samples of the first task, 3 to 5 for those of the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.fc = nn.Linear(5, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        shown = (torch.arange(6) < 3) == (x[:, :1] > 0)
        return self.fc(self.body(x).tanh()).masked_fill(~shown, -torch.inf)


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
X[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4)
Y = torch.tensor([0, 1, 2, 0, 3, 4, 5, 3])
FIRST, SECOND = (X[:4], Y[:4]), (X[4:], Y[4:])


@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_samples_of_two_tasks_are_refused_however_they_are_split(estimator):
    for chunk in (3, 4, 8):
        with pytest.raises(ValueError, match="mask"):
            gradmix.select_pairs(
                MaskedByTask(), FIRST, (X, Y), head="fc", chunk_size=chunk, estimator=estimator, lam=0.3
            )


@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_candidates_of_another_task_are_refused(estimator):
    with pytest.raises(ValueError, match="model: masks other classes for sample 0"):
        gradmix.select_pairs(MaskedByTask(), FIRST, FIRST, candidates=SECOND, head="fc", estimator=estimator, lam=0.3)
    with pytest.raises(ValueError, match="model: masks other classes for sample 0"):
        gradmix.alignment_matrix(MaskedByTask(), FIRST, FIRST, candidates=SECOND, head="fc", lam=0.3)


def test_a_class_table_of_two_tasks_is_refused():
    mixup = gradmix.GradMix(MaskedByTask(), FIRST, criterion="class", head="fc")
    with pytest.raises(ValueError, match="model: masks other classes"):
        mixup.select(*SECOND)
    assert mixup.table is None


def test_a_batch_of_one_task_is_judged_by_a_buffer_of_both():
    model = MaskedByTask()
    parts = [gradmix.reference_gradient(model, part, head="fc") for part in (FIRST, SECOND)]
    both = gradmix.reference_gradient(model, (X, Y), head="fc", chunk_size=4)
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
    pairs = gradmix.select_pairs(model, (X, Y), FIRST, head="fc", chunk_size=4, lam=0.3)
    assert pairs.alignment.isfinite().all()
