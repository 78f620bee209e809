"""Models with parts that TorchScript compiled, which takes no hooks and whose calls are not seen."""

import pytest
import torch
from torch import nn

import gradmix
from gradmix.model.head import HeadNotFoundError

# Tracing warns of everything that it will not see.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")

X, Y = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
EXAMPLE = torch.zeros(3, 6)


def network(normalise: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5, track_running_stats=False) if normalise else nn.Identity()
    return nn.Sequential(nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh()), nn.Linear(5, 4)).eval()


COMPILED = {"scripted": torch.jit.script, "traced": lambda module: torch.jit.trace(module, EXAMPLE)}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("head", [None, "1"])
def test_a_scripted_body_is_served(how, head):
    plain, model = network(), network()
    model[0] = COMPILED[how](model[0])
    found, expected = (gradmix.alignment_matrix(m, (X, Y), (X, Y), lam=0.3, head=head).cosine for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_scripted_classifier_is_refused_and_the_advice_holds():
    model = network()
    expected = gradmix.alignment_matrix(model, (X, Y), (X, Y), lam=0.3, estimator="jvp").cosine
    model[1] = torch.jit.script(model[1])
    with pytest.raises(TypeError, match="head: got a torch.jit.ScriptModule"):
        gradmix.select_pairs(model, (X, Y), (X, Y), head="1")
    with pytest.raises(HeadNotFoundError, match="without_rule='exact'"):
        gradmix.select_pairs(model, (X, Y), (X, Y))
    estimator = gradmix.JvpEstimator(without_rule="exact")
    found = gradmix.alignment_matrix(model, (X, Y), (X, Y), lam=0.3, estimator=estimator).cosine
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_scripted_as_a_whole_is_refused_by_name(how):
    model = COMPILED[how](network())
    for call in (
        lambda: gradmix.select_pairs(model, (X, Y), (X, Y)),
        lambda: gradmix.reference_gradient(model, (X, Y)),
        lambda: gradmix.HeadCapture(model, example=X),
    ):
        with pytest.raises(TypeError, match="model: got a torch.jit.ScriptModule.*expected the module that it was"):
            call()


@pytest.mark.parametrize("how", COMPILED)
def test_statistics_of_the_batch_inside_a_scripted_body_are_refused(how):
    model = network(normalise=True)
    model[0] = COMPILED[how](model[0])
    for chunk in (4, 512):
        with pytest.raises(gradmix.gradients.BatchStatisticsError):
            gradmix.select_pairs(model, (X, Y), (X, Y), chunk_size=chunk)
