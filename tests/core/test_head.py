"""Finding, naming and capturing the classifier head."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import truth
from models import CLASSES, MLP, NETWORKS, ConvNet, rows
from torch import Tensor, nn

import gradmix
from gradmix.model.head import HeadNotFoundError, logits_of, resolve_head
from gradmix.model.head_capture import HeadCapture
from gradmix.model.head_values import MASKED


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_the_head_is_found_by_itself(name: str) -> None:
    model = NETWORKS[name]()
    head = resolve_head(model, None, rows(2)[0])
    assert head.module is model.fc
    assert head.num_classes == CLASSES
    assert head.direct


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_capture_gives_what_the_head_saw_and_said(name: str) -> None:
    model = NETWORKS[name]().eval()
    x = rows(3)[0]
    with HeadCapture(model, example=x) as capture:
        logits = logits_of(model(x))
    features, captured = capture.output
    assert torch.equal(captured, logits)
    weight = model.fc.weight.flatten(1)
    torch.testing.assert_close(F.linear(features, weight, model.fc.bias), logits)
    assert not features.requires_grad and not captured.requires_grad
    assert not model.fc._forward_hooks


def test_logits_masked_in_place_are_captured_as_masked() -> None:
    class Masked(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill_(torch.arange(CLASSES) > 2, -1e9)

    model, x = Masked(), rows(2)[0]
    with HeadCapture(model, head="fc") as capture:
        logits = model(x)
    assert torch.equal(capture.output.logits[:, :3], logits[:, :3])
    assert (capture.output.logits[:, 3:] == MASKED).all()


def test_logits_that_the_loss_changes_in_place_are_captured_as_returned() -> None:
    model, x = MLP(), rows(2)[0]
    with HeadCapture(model, head="fc") as capture, torch.no_grad():
        logits = model(x)
        returned = logits.clone()
        logits[:, 2:] = -1e9
    assert torch.equal(capture.output.logits, returned)


class Probabilities(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Adapted(MLP):
    """An adapter adds to the classifier's output, zero as adapters begin."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("adapter", nn.Parameter(torch.zeros(CLASSES, 192)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x.flatten(1), self.adapter)


class Functional(nn.Module):
    """The classifier is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(CLASSES, 192))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.embedding)


class Dense(nn.Module):
    """Classifies every position."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    {
        "softmax": (Probabilities, r"something follows 'fc' \(Linear, weight 5x12\) that changes its logits"),
        "adapter": (Adapted, "parameters of shape 5x192 take part beside 'fc'"),
        "no module": (Functional, "no linear layer of the model gives 5 logits"),
        "every position": (Dense, r"returns logits of shape \(2, 5, 8, 8\), expected \(N, C\)"),
    }.values(),
)
def test_an_uncertain_head_is_refused_with_the_reason(kind: type[nn.Module], why: str) -> None:
    with pytest.raises(HeadNotFoundError, match=why) as error:
        resolve_head(kind(), None, rows(2)[0])
    # To name a layer would not help.
    assert "head=" not in str(error.value)


def test_logits_cast_to_another_dtype_are_still_the_heads() -> None:
    class Cast(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    model = Cast()
    assert resolve_head(model, None, rows(2)[0]).module is model.fc


def test_a_head_may_be_named_by_module_or_by_name() -> None:
    model = MLP()
    assert resolve_head(model, "fc").module is resolve_head(model, model.fc).module is model.fc


@pytest.mark.parametrize(
    ("head", "error", "message"),
    {
        "no such name": ("classifier", HeadNotFoundError, "no module 'classifier'; .*are 'body.1', 'fc'"),
        "foreign module": (nn.Linear(2, 2), HeadNotFoundError, "not a module of the model"),
        "not linear": ("body.2", HeadNotFoundError, "got ReLU, expected a linear layer"),
        "a number": (3, TypeError, "head: got int"),
    }.values(),
)
def test_a_wrong_name_is_refused(head: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_head(MLP(), head, rows(1)[0])


def test_a_head_that_was_replaced_is_found_again() -> None:
    model, x = MLP(), rows(2)[0]
    first = resolve_head(model, None, x).module
    model.fc = nn.Linear(12, CLASSES + 2)
    assert resolve_head(model, None, x).module is model.fc is not first
    assert resolve_head(model, None, x).num_classes == CLASSES + 2


def test_a_head_that_moved_is_found_again() -> None:
    model, x = MLP(), rows(2)[0]
    resolve_head(model, None, x)
    model.fc = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, CLASSES))
    assert resolve_head(model, None, x).module is model.fc[1]


def test_a_head_that_is_remembered_keeps_no_model_alive() -> None:
    model = nn.Linear(192, CLASSES)
    known = weakref.ref(model)
    resolve_head(model, None, rows(2)[0].flatten(1))
    del model
    gc.collect()
    assert known() is None


def test_a_head_found_once_needs_no_example() -> None:
    model, x = MLP(), rows(2)[0]
    with pytest.raises(HeadNotFoundError, match="no example samples"):
        HeadCapture(model)
    resolve_head(model, None, x)
    with HeadCapture(model) as capture:
        model(x)
    assert len(capture.output.logits) == 2


def test_a_head_that_runs_twice_is_refused() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-x)

    model = Twice()
    with HeadCapture(model, head="fc") as capture:
        model(rows(2)[0])
    with pytest.raises(HeadNotFoundError, match="was seen to run 2 times in one forward pass"):
        _ = capture.output


def test_a_head_on_several_positions_is_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).mean(1)

    model = Mean()
    with HeadCapture(model, head="fc") as capture:
        model(rows(2)[0].flatten(1, 2))
    with pytest.raises(HeadNotFoundError, match="sample 0 are those of no one position of the input of 'fc'"):
        _ = capture.output


def test_a_head_called_by_keyword_is_captured() -> None:
    class Keyword(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=self.body(x))

    model = Keyword()
    with HeadCapture(model, head="fc") as capture:
        model(rows(2)[0])
    assert capture.output.features.shape == (2, 12)


def test_wrapped_models_are_looked_into() -> None:
    model = ConvNet()
    compiled = torch.compile(model, backend="eager")
    assert resolve_head(compiled, None, rows(2)[0]).module is model.fc
    assert resolve_head(nn.DataParallel(MLP()), "fc").num_classes == CLASSES


def test_a_model_that_returns_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: returned list, expected a tensor or an object with a tensor \.logits"):
        logits_of([1])
    assert logits_of({"logits": torch.ones(1)}).item() == 1


def test_a_head_of_another_task_is_looked_for_anew():
    class ByTask(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
            self.task = 0

        def forward(self, x):
            return self.heads[self.task](x)

    torch.manual_seed(0)
    model, x, y = ByTask(), torch.randn(7, 5), torch.arange(7) % 3
    gradmix.reference_gradient(model, (x, y))
    model.task = 1
    with pytest.raises(HeadNotFoundError, match="heads.0.*run 0 times.*the next call looks for its head anew"):
        gradmix.reference_gradient(model, (x, y))
    torch.testing.assert_close(
        gradmix.reference_gradient(model, (x, y)), truth.reference(model, "heads.1", x, y).float(), rtol=1e-5, atol=1e-6
    )


class Projection(nn.Module):
    """A layer as GPT-2 has it: weight (d, C)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, classes)), nn.Parameter(torch.randn(classes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_named_head_may_have_its_weight_the_other_way_round() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Projection(5, 4)), torch.randn(8, 6)
    layer = resolve_head(model, "2", x).layers[0]
    assert layer.transposed and layer.bias == "bias"
    batch = x, torch.arange(8) % 4
    named, found = (
        gradmix.select_pairs(model, batch, batch, head=head, generator=torch.Generator().manual_seed(0), lam=0.3)
        for head in ("2", None)
    )
    assert torch.equal(named.partner, found.partner)


def test_a_head_replaced_by_one_of_another_shape_is_found_by_the_next_call() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))
    batch = torch.randn(8, 6), torch.arange(8) % 4
    gradmix.select_pairs(model, batch, batch)
    model[2] = Projection(5, 4)
    with pytest.raises(HeadNotFoundError, match=r"'2' \(Projection, weight 5x4\) made 4 logits of 5 features"):
        gradmix.select_pairs(model, batch, batch)
    gradmix.select_pairs(model, batch, batch)
    assert resolve_head(model).layers[0].transposed
