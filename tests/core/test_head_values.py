"""What follows the classifier: served exactly, or refused; never judged by logits that are not the model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import CLASSES, REFUSED, SEEN, SERVED, Averaged, Net, after
from no_looking import behind_the_host, watched
from torch import Tensor, nn

import gradmix
from gradmix.model.head import HeadNotFoundError, logits_of
from gradmix.model.head_capture import HeadCapture
from gradmix.runtime import deferred_checks

LAM = 0.6
OFF_DIAGONAL = ~torch.eye(12, dtype=torch.bool, device="cpu")


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 10, generator=g).double(), torch.arange(count) % SEEN


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double().eval()


def classifiers(model: nn.Module) -> list[nn.Parameter]:
    names = ("fc.", "fc_dist.", "score.")
    return [p for name, p in model.named_parameters() if name.startswith(names)]


def features_mixed(model: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """The logits where the inputs of the classifiers are mixed, by hooks."""
    modules = [m for name, m in model.named_modules() if name in ("fc", "fc_dist", "score")]
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[module] = args[0].detach()

    handles = [m.register_forward_pre_hook(keep) for m in modules]
    model(other)
    for handle in handles:
        handle.remove()
    partners = dict(inputs)
    handles = [
        m.register_forward_pre_hook(lambda module, args: (LAM * args[0].detach() + (1 - LAM) * partners[module],))
        for m in modules
    ]
    z = logits_of(model(x))
    for handle in handles:
        handle.remove()
    return z


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Without 0 * inf of masked classes."""
    terms = torch.where(target > 0, target * z.log_softmax(1), 0)
    return -terms.sum(1).mean()


def truth(model: nn.Module, buffer: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cosines of all pairs' gradients with the buffer's, of the classifiers' parameters by autograd, pair by pair."""
    weights = _effective(model)

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    hot = [F.one_hot(y, CLASSES).double() for _, y in (buffer, batch)]
    reference = flat(cross_entropy(logits_of(model(buffer[0])), hot[0]))
    x = batch[0]
    result = torch.zeros(len(x), len(x)).double()
    for i in range(len(x)):
        for j in range(len(x)):
            z = features_mixed(model, x[i : i + 1], x[j : j + 1])
            target = LAM * hot[1][i : i + 1] + (1 - LAM) * hot[1][j : j + 1]
            result[i, j] = F.cosine_similarity(flat(cross_entropy(z, target)), reference, 0)
    return result


def _effective(model: nn.Module) -> list[Tensor]:
    """The classifiers' weights; of a parametrised one the weight that it makes, as a parameter of its own."""
    fc = getattr(model, "fc", None)
    if fc is not None and nn.utils.parametrize.is_parametrized(fc):
        nn.utils.parametrize.remove_parametrizations(fc, "weight")
    return list(classifiers(model))


BUFFER, BATCH = data(14, 1), data(12, 2)


@pytest.mark.parametrize("kind", SERVED, ids=str)
def test_what_follows_the_classifier_is_served_exactly(kind: str) -> None:
    model = made(SERVED[kind])
    got = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM).alignment
    want = truth(model, BUFFER, BATCH)
    # Last tokens are mixed position by position in the truth, which takes the first sample's position.
    mask = OFF_DIAGONAL & _same_position(kind)
    torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=1e-9)


def _same_position(kind: str) -> Tensor:
    if kind != "one of many tokens":
        return OFF_DIAGONAL
    at = BATCH[0][:, 0] > 0
    return at[:, None] == at


@pytest.mark.parametrize("kind", [k for k in SERVED if "two heads" not in k], ids=str)
def test_a_named_head_gives_the_same_as_one_that_is_found(kind: str) -> None:
    model = made(SERVED[kind])
    name = "score" if hasattr(model, "score") else "fc"
    found = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM).alignment
    for head in (name, model.get_submodule(name)):
        named = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM, head=head)
        torch.testing.assert_close(named.alignment, found, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("kind", [k for k in SERVED if k not in ("one of many tokens", "weight norm")], ids=str)
def test_the_reference_gradient_is_the_classifiers(kind: str) -> None:
    model = made(SERVED[kind])
    got = gradmix.reference_gradient(model, BUFFER)
    loss = cross_entropy(logits_of(model(BUFFER[0])), F.one_hot(BUFFER[1], CLASSES).double())
    parts = []
    for gradient in torch.autograd.grad(loss, list(model.parameters())[-_classifier_tensors(model) :]):
        matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        parts.append(matrix if len(matrix) == CLASSES else matrix.T)
    torch.testing.assert_close(got, torch.cat(parts, 1), rtol=0, atol=1e-12)


def _classifier_tensors(model: nn.Module) -> int:
    return sum(1 for name, _ in model.named_parameters() if name.startswith(("fc.", "fc_dist.")))


@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["feature", "mixed"])
@pytest.mark.parametrize("kind", ["masked by -1000", "temperature", "average of two heads", "own class, dictionary"])
def test_every_last_layer_estimator_sees_the_models_logits(kind: str, estimator: Any, criterion: Any) -> None:
    # With a linear body, features of mixed inputs are mixed features.
    model = made(SERVED[kind])
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            module[1] = nn.Identity()
    if isinstance(model, Averaged):
        model.forward = lambda x: (model.fc(model.body(x)) + model.fc_dist(model.other(x))) / 2
    how = {"lam": LAM, "estimator": estimator, "criterion": criterion}
    got = gradmix.select_pairs(model, BUFFER, BATCH, **how).alignment
    how["estimator"] = "feature"
    want = gradmix.select_pairs(model, BUFFER, BATCH, **how).alignment
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
@pytest.mark.parametrize("head", [None, "fc"])
def test_what_changes_the_logits_otherwise_is_refused(kind: str, head: str | None) -> None:
    model = made(REFUSED[kind])
    for call in (
        lambda: gradmix.select_pairs(model, BUFFER, BATCH, head=head),
        lambda: gradmix.reference_gradient(model, BUFFER, head=head),
        lambda: gradmix.GradMix(model, BUFFER, head=head)(*BATCH),
    ):
        with pytest.raises(HeadNotFoundError, match=r"^head: "):
            call()


@pytest.mark.parametrize("kind", [k for k in REFUSED if k != "mask of each sample"], ids=str)
def test_the_refusals_advice_works(kind: str) -> None:
    model = made(REFUSED[kind])
    for head in (None, "fc"):
        with pytest.raises(HeadNotFoundError, match=r"estimator=gradmix\.JvpEstimator\(without_rule='exact'\)"):
            gradmix.select_pairs(model, BUFFER, BATCH, head=head)
    estimator = gradmix.JvpEstimator(without_rule="exact")
    assert len(gradmix.select_pairs(model, BUFFER, BATCH, estimator=estimator)) == 12


@pytest.mark.parametrize("name", ["fc", "fc_dist"])
def test_one_of_two_averaged_heads_is_refused_and_the_advice_works(name: str) -> None:
    model = made(Averaged)
    with pytest.raises(HeadNotFoundError, match="leave head= out") as error:
        gradmix.select_pairs(model, BUFFER, BATCH, head=name)
    assert "name it" not in str(error.value)
    assert len(gradmix.select_pairs(model, BUFFER, BATCH)) == 12


class Changing(Net):
    """What follows the classifier sets in later."""

    function: Callable[[Tensor], Tensor] = staticmethod(lambda z: z)

    def after(self, z: Tensor) -> Tensor:
        return type(self).function(z)


CHANGES = {
    "mask": lambda z: z.masked_fill(torch.arange(CLASSES) >= SEEN, -torch.inf),
    "finite mask": lambda z: z.masked_fill(torch.arange(CLASSES) >= SEEN, -1e3),
    "temperature": lambda z: z / 0.1,
    "log-softmax": lambda z: z.log_softmax(1),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("head", [None, "fc"])
def test_what_sets_in_after_the_head_was_found_is_served(
    change: str, head: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Changing)
    gradmix.select_pairs(model, BUFFER, BATCH, head=head)
    monkeypatch.setattr(Changing, "function", staticmethod(CHANGES[change]))
    got = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM, head=head).alignment
    want = truth(model, BUFFER, BATCH)
    torch.testing.assert_close(got[OFF_DIAGONAL], want[OFF_DIAGONAL], rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", [None, "fc"])
def test_what_cannot_be_served_is_refused_also_if_it_sets_in_later(
    head: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Changing)
    gradmix.select_pairs(model, BUFFER, BATCH, head=head)
    monkeypatch.setattr(Changing, "function", staticmethod(lambda z: z.softmax(1)))
    with pytest.raises(HeadNotFoundError, match="sample 0 are not those of 'fc'"):
        gradmix.select_pairs(model, BUFFER, BATCH, head=head)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_where_nothing_is_looked_at_the_decisions_are_the_same(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Changing)
    gradmix.select_pairs(model, BUFFER, BATCH)
    behind_the_host(monkeypatch)
    monkeypatch.setattr(Changing, "function", staticmethod(CHANGES[change]))
    for _ in range(3):  # found out after the first
        with watched():
            pairs = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM)
        want = truth(model, BUFFER, BATCH)
        torch.testing.assert_close(pairs.alignment[OFF_DIAGONAL], want[OFF_DIAGONAL], rtol=0, atol=1e-9)
        deferred_checks.raise_deferred()


@pytest.mark.parametrize("kind", SERVED, ids=str)
def test_where_nothing_is_looked_at_heads_are_served_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(SERVED[kind])
    expected = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM).alignment
    behind_the_host(monkeypatch)
    with watched():
        pairs = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM)
    deferred_checks.raise_deferred()
    torch.testing.assert_close(pairs.alignment, expected, rtol=0, atol=1e-9, equal_nan=True)


def test_where_nothing_is_looked_at_the_next_call_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Changing)
    gradmix.select_pairs(model, BUFFER, BATCH)
    behind_the_host(monkeypatch)
    monkeypatch.setattr(Changing, "function", staticmethod(lambda z: z.softmax(1)))
    gradmix.select_pairs(model, BUFFER, BATCH)
    with pytest.raises(HeadNotFoundError, match="found on the GPU in an earlier call"):
        gradmix.select_pairs(model, BUFFER, BATCH)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_label_of_a_masked_class_is_an_error(labels: str) -> None:
    model = made(SERVED["masked by -1000"])
    x, y = BATCH
    y = torch.where(torch.arange(12) == 7, SEEN, y)
    if labels == "soft":
        y = F.one_hot(y, CLASSES).double()
    with pytest.raises(ValueError, match="batch: sample 7 has a label among the classes that the model masks"):
        gradmix.select_pairs(model, BUFFER, (x, y))
    with pytest.raises(ValueError, match="buffer: sample 7 has a label among the classes that the model masks"):
        gradmix.select_pairs(model, (x, y), BATCH)


MARKED = torch.arange(12, device="cpu") % 3 == 0


@pytest.mark.parametrize("kind", [k for k in SERVED if k != "weight norm"], ids=str)
@pytest.mark.parametrize("head", ["found", "unknown"])
def test_outputs_with_marked_samples_are_those_of_a_pass(kind: str, head: str) -> None:
    model = made(SERVED[kind])
    expected = gradmix.select_pairs(model, MARKED, BATCH, lam=LAM).alignment
    with HeadCapture(model, example=BATCH[0]) as capture, torch.no_grad():
        model(BATCH[0])
    if head == "unknown" and "two heads" not in kind:
        model = made(SERVED[kind])  # nothing is known of this one
    got = gradmix.select_pairs(model, MARKED, BATCH, lam=LAM, outputs=capture.output).alignment
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, equal_nan=True)


def test_outputs_with_marked_samples_need_no_head_and_no_pass() -> None:
    class Never(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("a pass was made")

    model, known = made(Never), made(Net)
    h = known.body(BATCH[0]).detach()
    outputs = (h, known.fc(h).detach())
    want = gradmix.select_pairs(known, MARKED, BATCH, lam=LAM).alignment
    got = gradmix.select_pairs(model, MARKED, BATCH, lam=LAM, outputs=outputs).alignment
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("source", ["buffer", "marks"])
def test_outputs_of_other_weights_are_refused(source: str) -> None:
    model = made(Net)
    gradmix.select_pairs(model, BUFFER, BATCH)
    with HeadCapture(model) as capture, torch.no_grad():
        model(BATCH[0])
    before = tuple(capture.output)  # as a caller's own: what was captured was checked then
    with torch.no_grad():
        model.fc.weight.mul_(1.01).add_(0.01)
    buffer = BUFFER if source == "buffer" else MARKED
    with pytest.raises(HeadNotFoundError, match="outputs: got logits that are not those of 'fc'"):
        gradmix.select_pairs(model, buffer, BATCH, outputs=before)
    with HeadCapture(model) as capture, torch.no_grad():
        model(BATCH[0])
    assert len(gradmix.select_pairs(model, buffer, BATCH, outputs=capture.output)) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "masked by -1000", "temperature", "log-softmax", "average of two heads"])
def test_half_precision_is_served_under_autocast_and_as_the_models_dtype(kind: str, dtype: torch.dtype) -> None:
    model = made(SERVED[kind]).float()
    batch, buffer = ((x.float(), y) for x, y in (BATCH, BUFFER))
    with torch.autocast("cpu", dtype):
        assert len(gradmix.select_pairs(model, buffer, batch)) == 12
    model, batch, buffer = model.to(dtype), (batch[0].to(dtype), batch[1]), (buffer[0].to(dtype), buffer[1])
    assert len(gradmix.select_pairs(model, buffer, batch)) == 12


@pytest.mark.parametrize("kind", REFUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_nothing_that_is_refused(kind: str, dtype: torch.dtype) -> None:
    model = made(REFUSED[kind]).float()
    with torch.no_grad():
        model.fc.weight.mul_(8)  # a function that bends is seen where logits are not small
    batch, buffer = ((x.float(), y) for x, y in (BATCH, BUFFER))
    with torch.autocast("cpu", dtype), pytest.raises(HeadNotFoundError):
        gradmix.select_pairs(model, buffer, batch)


def test_a_model_that_is_not_called_itself_is_an_error() -> None:
    model = made(Net)
    with HeadCapture(model, "fc") as capture:
        model.fc(model.body(BATCH[0]))
    with pytest.raises(
        HeadNotFoundError, match="the model was seen to run 0 times in one forward pass of the model, expected once"
    ):
        _ = capture.output


def test_inference_mode_is_served() -> None:
    model = made(after(lambda z: z / 2))
    want = gradmix.select_pairs(model, BUFFER, BATCH, lam=LAM).alignment
    with torch.inference_mode():
        fresh = made(after(lambda z: z / 2))
        got = gradmix.select_pairs(fresh, BUFFER, BATCH, lam=LAM).alignment
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9, equal_nan=True)


def test_weights_that_change_before_the_output_is_read_do_no_harm() -> None:
    model = made(Net)
    with HeadCapture(model, "fc") as capture, torch.no_grad():
        logits = model(BATCH[0])
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert torch.equal(capture.output.logits, logits)
