"""Gradients by class: sums of the samples', merging over batches and processes, keeping, averaging, comparing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import start_processes
from gradient_networks import ARCHITECTURES, LAYERS, Case
from gradient_truth import by_class, layer_matrix
from gradient_truth import sample_gradients as truth
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from two_processes import SPLITS, TABULAR, part, process, tabular

import gradmix
from gradmix.gradients import ClassGradientAverage, ClassGradients

EXACT = 1e-9
ROUNDING = 1e-12
NAMES = ["resnet-18 with batch norm", "vit", "text classifier", "tabular mlp"]


def assert_same(a: ClassGradients, b: ClassGradients, tolerance: float = ROUNDING) -> None:
    assert torch.equal(a.classes, b.classes) and torch.equal(a.counts, b.counts)
    assert a.counts.dtype == a.classes.dtype == torch.int64
    assert a.layout == b.layout and dict(a.sketch) == dict(b.sketch)
    assert (a.square_norms is None) == (b.square_norms is None)
    for name in ("vectors", "square_norms") if a.square_norms is not None else ("vectors",):
        mine, other = getattr(a, name), getattr(b, name)
        assert mine.dtype == other.dtype
        assert (mine - other).abs().max() <= tolerance * other.abs().max(), name


# ---------------------------------------------------------------------------------------------------------- the sums


@pytest.mark.parametrize("sketch", ["rademacher", "gaussian", "identity", "rows"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_of_the_samples(name: str, sketch: str) -> None:
    case = ARCHITECTURES[name]
    model, (x, y) = case.model(), case.batch(8)
    samples = gradmix.sample_gradients(model, (x, y), rank=3, seed=2, sketch=sketch)
    result = gradmix.class_gradients(model, (x, y), rank=3, seed=2, sketch=sketch)
    assert result.layout == samples.layout
    assert torch.equal(result.classes, y.unique())
    for p, c in enumerate(result.classes.tolist()):
        rows = samples.vectors[y == c]
        assert result.counts[p] == len(rows)
        assert (result.vectors[p] - rows.sum(0)).abs().max() <= ROUNDING * rows.abs().sum(0).max()
        for index, place in enumerate(result.layout):
            part = rows[:, place.start : place.start + place.rows * place.columns]
            assert math.isclose(result.square_norms[p, index], part.square().sum(), rel_tol=1e-11, abs_tol=1e-18)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_the_loop_over_single_samples(name: str) -> None:
    case = ARCHITECTURES[name]
    model, (x, y) = case.model(), case.batch()
    result = gradmix.class_gradients(model, (x, y), sketch="identity")
    gradients = truth(model, x, y)
    sums = by_class(gradients, y, result.classes)
    for index, place in enumerate(result.layout):
        single = layer_matrix(gradients, place)
        expected = layer_matrix(sums, place)
        assert (result.layer(place.name) - expected).abs().max() <= EXACT * expected.abs().max()
        squares = single.square().sum((1, 2))
        squares = torch.stack([squares[y == c].sum() for c in result.classes])
        assert torch.allclose(result.square_norms[:, index], squares, rtol=1e-9)


def test_every_layer_rule_by_class() -> None:
    """Samples of one class are added up in the product already: another path than that of single samples."""
    for name, case in LAYERS.items():
        if case.rows == 1 or "even kernel" in name or "same, dilation" in name or "not square, same" in name:
            continue
        model, (x, y) = case.model(), case.batch(4)
        y = torch.tensor([2, 0, 2, 2])
        samples = gradmix.sample_gradients(model, (x, y), rank=2)
        result = gradmix.class_gradients(model, (x, y), rank=2)
        expected = torch.stack([samples.vectors[y == c].sum(0) for c in (0, 2)])
        assert (result.vectors - expected).abs().max() <= ROUNDING * (1 + expected.abs().max()), name
        squares = torch.stack([samples.layer(p.name).square().sum((1, 2)) for p in result.layout], 1)
        expected = torch.stack([squares[y == c].sum(0) for c in (0, 2)])
        assert (result.square_norms - expected).abs().max() <= ROUNDING * (1 + expected.abs().max()), name


def test_soft_labels_count_for_their_largest_entry() -> None:
    case = Case(lambda: nn.Linear(6, 4), (6,), rows=5, soft=True)
    model, (x, y) = case.model(), case.batch()
    samples = gradmix.sample_gradients(model, (x, y), sketch="identity")
    result = gradmix.class_gradients(model, (x, y), sketch="identity")
    assert torch.equal(result.classes, y.argmax(1).unique())
    for p, c in enumerate(result.classes):
        expected = samples.vectors[y.argmax(1) == c].sum(0)
        assert torch.allclose(result.vectors[p], expected, rtol=1e-12)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*TABULAR.batch(9), strict=True))


def _buffer() -> gradmix.ReplayBuffer:
    buffer = gradmix.ReplayBuffer(100)
    buffer.add(*TABULAR.batch(9))
    return buffer


SOURCES: dict[str, Callable[[], object]] = {
    "replay buffer": _buffer,
    "data set": lambda: TensorDataset(*TABULAR.batch(9)),
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(*TABULAR.batch(9)), batch_size=4),
    "loader with a batch size beyond the chunk": lambda: DataLoader(TensorDataset(*TABULAR.batch(9)), batch_size=9),
    "shuffling loader": lambda: DataLoader(TensorDataset(*TABULAR.batch(9)), batch_size=2, shuffle=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_of_rows(name: str) -> None:
    result = gradmix.class_gradients(TABULAR.model(), SOURCES[name](), rank=3, chunk_size=5)
    assert_same(result, tabular())


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8, 9, 1000])
def test_the_chunk_size_does_not_matter(chunk_size: int) -> None:
    assert_same(tabular(chunk_size=chunk_size), tabular())


# ------------------------------------------------------------------------------------------------------------ merging


def test_merging_is_the_same_as_all_rows_at_once() -> None:
    whole = tabular(9, classes=[0, 1, 1, 3, 3, 3, 1, 0, 2])
    x, _ = TABULAR.batch(9)
    labels = torch.tensor([0, 1, 1, 3, 3, 3, 1, 0, 2])
    model = TABULAR.model()
    for cuts in ([4, 5], [1, 8], [3, 3, 3], [2, 4, 1, 2]):
        parts = [
            gradmix.class_gradients(model, part, rank=3) for part in zip(x.split(cuts), labels.split(cuts), strict=True)
        ]
        for order in (parts, parts[::-1], parts[1:] + parts[:1]):
            total = order[0]
            for other in order[1:]:
                total = total + other
            assert_same(total, whole)


def test_merging_leaves_the_parts_alone() -> None:
    a, b = tabular(4, 0, classes=[0, 0, 1, 3]), tabular(3, 1, classes=[1, 2, 2])
    before = copy.deepcopy((a, b))
    both = a + b
    assert_same(a, before[0], 0)
    assert_same(b, before[1], 0)
    both.vectors.zero_()
    assert_same(a, before[0], 0)
    assert both.classes.tolist() == [0, 1, 2, 3] and both.counts.tolist() == [2, 2, 2, 1]


def test_merging_into_is_the_same_as_merging() -> None:
    for classes in ([1, 2, 2], [0, 1, 3]):  # a new class among them, and none
        a, b = tabular(4, 0, classes=[0, 0, 1, 3]), tabular(3, 1, classes=classes)
        both = a + b
        assert a.add_(b) is a
        assert_same(a, both, 0)


DIFFERENT: dict[str, tuple[Callable[[], ClassGradients], str]] = {
    "seed": (lambda: tabular(seed=1), r"seed 1.*seed 0"),
    "rank": (lambda: tabular(rank=4), r"rank 4.*rank 3"),
    "kind": (lambda: tabular(sketch="gaussian"), r"gaussian.*rademacher"),
    "layers": (lambda: tabular(layers=["first"]), r"layers.*head"),
    "model": (
        lambda: gradmix.class_gradients(ARCHITECTURES["vit"].model(), ARCHITECTURES["vit"].batch(), rank=3),
        r"layers",
    ),
    "sizes": (
        lambda: gradmix.class_gradients(
            nn.Sequential(nn.Linear(7, 15), nn.Linear(15, 4)).double(), TABULAR.batch(9), rank=3
        ),
        r"layers",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_does_not_merge(name: str) -> None:
    make, message = DIFFERENT[name]
    mine, other = tabular(), make()
    before = copy.deepcopy(mine)
    with pytest.raises(ValueError, match=message):
        mine + other
    with pytest.raises(ValueError, match=message):
        mine.add_(other)
    assert_same(mine, before, 0)
    with pytest.raises(ValueError, match=rf"reference.*({message})"):
        mine.align(other)


def test_with_and_without_norms_do_not_merge() -> None:
    mine, other = tabular(), tabular(seed=0, norms=False)
    assert torch.equal(mine.vectors, other.vectors) and other.square_norms is None
    before = copy.deepcopy((mine, other))
    for a, b, message in ((mine, other, "got some without .* expected them with"), (other, mine, "got some with ")):
        for merge in (ClassGradients.__add__, ClassGradients.add_):
            with pytest.raises(ValueError, match=rf"{message}.*norms="):
                merge(a, b)
        average = ClassGradientAverage()
        average.update(a)
        with pytest.raises(ValueError, match=message):
            average.update(b)
    assert_same(mine, before[0], 0)
    assert_same(other, before[1], 0)
    assert torch.equal(mine.align(other).cosine, mine.align(mine).cosine)
    mine.square_norms = None  # as the error says
    assert (mine + other).square_norms is None


@pytest.mark.parametrize("norms", [True, False])
def test_merged_averaged_selected_and_moved_with_and_without_norms(norms: bool) -> None:
    """Everything but the norms is the same without them."""
    a, b = tabular(4, 0, classes=[0, 0, 1, 3], norms=norms), tabular(3, 1, classes=[1, 2, 2], norms=norms)
    whole, other = tabular(4, 0, classes=[0, 0, 1, 3]), tabular(3, 1, classes=[1, 2, 2])
    average, expected = ClassGradientAverage(0.5), ClassGradientAverage(0.5)
    for step, same in ((a, whole), (b, other)):
        average.update(step)
        expected.update(same)
    pairs = [
        (a + b, whole + other),
        (copy.deepcopy(a).add_(b), whole + other),
        (a.select(torch.tensor([0, 3])), whole.select(torch.tensor([0, 3]))),
        (a.to("cpu"), whole),
        (a.all_reduce(), whole),
        (average.value, expected.value),
    ]
    for result, wanted in pairs:
        assert result.ways == {"layer rules"}
        if not norms:
            wanted.square_norms = None
        assert_same(result, wanted, 0)


def test_only_class_gradients_merge() -> None:
    with pytest.raises(TypeError):
        tabular() + 3
    with pytest.raises(TypeError):
        tabular() + tabular().vectors


# ---------------------------------------------------------------------------------------------------------- comparing


def test_formulas_of_comparison() -> None:
    """Against numpy in float64, from the vectors alone."""
    a, b = tabular(9, 0), tabular(7, 1)
    v, n = a.vectors.numpy(), a.counts.numpy()[:, None]
    reference = b.vectors.numpy().sum(0) / b.counts.numpy().sum()
    mean = v / n
    np.testing.assert_allclose(a.mean().numpy(), mean, rtol=1e-13)
    np.testing.assert_allclose(b.overall_mean().numpy(), reference, rtol=1e-13)
    norms = np.sqrt((mean**2).sum(1))
    np.testing.assert_allclose(a.cosine().numpy(), (mean @ mean.T) / norms[:, None] / norms, atol=1e-13)
    inner, cosine = a.align(b)
    np.testing.assert_allclose(inner.numpy(), mean @ reference, rtol=1e-11)
    expected = mean @ reference / norms / np.sqrt((reference**2).sum())
    np.testing.assert_allclose(cosine.numpy(), expected, atol=1e-13)
    by_vector = a.align(torch.from_numpy(reference))
    assert torch.allclose(by_vector.inner, inner) and torch.allclose(by_vector.cosine, cosine)


def test_samples_compare_with_classes() -> None:
    model, (x, y) = TABULAR.model(), TABULAR.batch()
    samples = gradmix.sample_gradients(model, (x, y), rank=3)
    reference = tabular(7, 1)
    inner, cosine = samples.align(reference)
    v, r = samples.vectors.numpy(), reference.overall_mean().numpy()
    np.testing.assert_allclose(inner.numpy(), v @ r, rtol=1e-11)
    np.testing.assert_allclose(cosine.numpy(), v @ r / np.linalg.norm(v, axis=1) / np.linalg.norm(r), atol=1e-13)
    units = v / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(samples.cosine().numpy(), units @ units.T, atol=1e-13)


def test_the_mean_over_the_buffer_is_the_reference_gradient_of_the_head() -> None:
    """What :func:`gradmix.reference_gradient` computes for the last layer alone."""
    model, batch = TABULAR.model(), TABULAR.batch()
    expected = gradmix.reference_gradient(model, batch)
    result = gradmix.class_gradients(model, batch, sketch="identity", layers=["head"])
    assert (result.overall_mean().view_as(expected) - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosines_of_vectors_of_any_length(scale: float) -> None:
    result = tabular()
    expected = result.cosine()
    result = ClassGradients(
        result.classes,
        result.vectors.float() * scale,
        result.counts,
        result.square_norms.float(),
        result.layout,
        result.sketch,
    )
    assert (result.cosine() - expected).abs().max() <= 1e-5


def test_no_cosine_beyond_one() -> None:
    vectors = torch.full((4, tabular().vectors.shape[1]), 0.1)
    base = tabular()
    result = ClassGradients(
        torch.arange(4), vectors, torch.ones(4, dtype=torch.int64), base.square_norms[:1], base.layout, base.sketch
    )
    assert (result.cosine() <= 1).all()


BAD_REFERENCES: dict[str, tuple[object, type[Exception], str]] = {
    "a number": (3.0, TypeError, r"reference: got float"),
    "a vector of another size": (torch.zeros(3), ValueError, r"reference: got shape \(3,\)"),
    "a matrix": (torch.zeros(2, 2), ValueError, r"reference: got shape \(2, 2\)"),
}


@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_bad_references(name: str) -> None:
    value, error, message = BAD_REFERENCES[name]
    with pytest.raises(error, match=message):
        tabular().align(value)


def test_classes_are_selected() -> None:
    result = tabular(9, classes=[0, 1, 1, 3, 3, 3, 1, 0, 2])
    part = result.select(torch.tensor([3, 7, 0]))
    assert part.classes.tolist() == [0, 3] and part.counts.tolist() == [2, 3]
    assert torch.equal(part.vectors, result.vectors[[0, 3]])
    assert torch.equal(part.square_norms, result.square_norms[[0, 3]])
    assert len(result) == 4 and len(part) == 2


# ------------------------------------------------------------------------------------------------------------ keeping


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_and_file_give_it_back_to_the_bit(dtype: torch.dtype, norms: bool, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="files of class gradients need safetensors, which is not installed")
    x, y = TABULAR.batch(dtype=dtype)
    result = gradmix.class_gradients(TABULAR.model(dtype), (x, y), rank={"head": 2, "*": 3}, seed=5, norms=norms)
    path = tmp_path / "state.pt"
    torch.save(result.state_dict(), path)
    assert_same(ClassGradients.from_state_dict(torch.load(path, weights_only=True)), result, 0)
    json.dumps({k: v for k, v in result.state_dict().items() if not isinstance(v, Tensor)})
    file = tmp_path / "classes.safetensors"
    result.save(file)
    loaded = ClassGradients.load(file)
    assert_same(loaded, result, 0)
    assert_same(loaded + result, result + result, 0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"state.pt", "classes.safetensors"}


def test_a_file_with_norms_is_of_version_1_and_lacks_nothing(tmp_path: Path) -> None:
    """Readers of version 1 refuse a file without norms by its version, and a version 1 without norms is damaged."""
    safetensors = pytest.importorskip(
        "safetensors", reason="files of class gradients need safetensors, which is not installed"
    )
    for norms, version, names in ((True, "1", set()), (False, "2", {"square_norms"})):
        file = tmp_path / f"{version}.safetensors"
        tabular(norms=norms).save(file)
        with safetensors.safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            assert about["version"] == version
            assert set(json.loads(about["about"])) == {"layout", "sketch"} | names
            assert set(opened.keys()) == {"classes", "vectors", "counts", "square_norms"} - names
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    for version, message in (("1", "square_norms"), ("3", "version '3'")):
        kept = json.loads(about["about"])
        kept.pop("square_norms")
        changed = about | {"version": version, "about": json.dumps(kept)}
        safetensors.torch.save_file(tensors, file, changed)
        with pytest.raises(ValueError, match=message):
            ClassGradients.load(file)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[:-7],
    "header cut": lambda content: content[:20],
    "empty": lambda content: b"",
    "text": lambda content: b"no safetensors at all",
    "a header length beyond the file": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="files of class gradients need safetensors, which is not installed")
    path = tmp_path / "classes.safetensors"
    tabular().save(path)
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ValueError, match=r"path: .*classes\.safetensors"):
        ClassGradients.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="files of class gradients need safetensors, which is not installed"
    )
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"path: .*expected 'gradmix.ClassGradients'"):
        ClassGradients.load(path)
    with pytest.raises(FileNotFoundError, match=r"path"):
        ClassGradients.load(tmp_path / "nothing")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="files of class gradients need safetensors, which is not installed")
    path = tmp_path / "classes.safetensors"
    tabular().save(path)
    before = path.read_bytes()
    broken = tabular()
    broken.sketch = {"seed": object()}
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


BAD_STATES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "a key missing": (lambda s: {k: v for k, v in s.items() if k != "counts"}, r"state: .*counts"),
    "vectors too narrow": (lambda s: s | {"vectors": s["vectors"][:, 1:]}, r"state: got vectors of shape"),
    "one class less": (lambda s: s | {"counts": s["counts"][1:]}, r"state: got counts of shape"),
    "one layer less": (lambda s: s | {"square_norms": s["square_norms"][:, 1:]}, r"state: got square_norms of shape"),
    "a layout that is none": (lambda s: s | {"layout": [3]}, r"state: got a layout"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_states(name: str) -> None:
    change, message = BAD_STATES[name]
    with pytest.raises(ValueError, match=message):
        ClassGradients.from_state_dict(change(tabular().state_dict()))


# ---------------------------------------------------------------------------------------------------------- averaging


def test_the_moving_average() -> None:
    """Against the recursion in numpy, with classes that come late and stay away."""
    decay = 0.75
    average = ClassGradientAverage(decay)
    assert average.value is None
    expected: dict[int, np.ndarray] = {}
    for step, classes in enumerate(([0, 0, 1, 1], [1, 3, 1, 3], [0, 2, 2, 2], [1, 1, 1, 0])):
        result = tabular(4, step, classes=classes)
        for c, mean in zip(result.classes.tolist(), result.mean().numpy(), strict=True):
            expected[c] = decay * expected[c] + (1 - decay) * mean if c in expected else mean
        value = average.update(result)
        assert value is average.value
        assert value.classes.tolist() == sorted(expected)
        for p, c in enumerate(value.classes.tolist()):
            np.testing.assert_allclose(value.mean()[p].numpy(), expected[c], rtol=1e-11, atol=1e-14)
    assert torch.isfinite(average.value.cosine()).all()


def test_the_moving_average_does_not_change_what_it_is_given() -> None:
    average, first, second = ClassGradientAverage(0.5), tabular(4, 0), tabular(4, 1)
    before = copy.deepcopy((first, second))
    average.update(first)
    average.update(second)
    assert_same(first, before[0], 0)
    assert_same(second, before[1], 0)


def test_the_moving_average_refuses_what_differs_and_keeps_its_value() -> None:
    average = ClassGradientAverage(0.5)
    average.update(tabular())
    before = copy.deepcopy(average.value)
    with pytest.raises(ValueError, match="rank"):
        average.update(tabular(rank=5))
    assert_same(average.value, before, 0)


@pytest.mark.parametrize(
    ("decay", "error"),
    [(1.0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.5", TypeError), (True, TypeError)],
)
def test_bad_decays(decay: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="decay: got"):
        ClassGradientAverage(decay)


# ---------------------------------------------------------------------------------------------------- several processes


def test_one_process_without_a_group_has_it_all() -> None:
    result = tabular()
    assert_same(result.all_reduce(), result, 0)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start_processes(process, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, classes in (SPLITS | {"a group": ([0, 0], [1, 1])}).items():
        parts = [part(c, rank) for rank, c in enumerate(classes) if c]
        expected = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        for told in (first, second):
            # Two addends: the order cannot matter, and the sum is the same to the last bit.
            assert_same(ClassGradients.from_state_dict(told[name]), expected, 0)
    for told in (first, second):
        assert len(told["both empty"]["classes"]) == 0
        assert "expected the same" in told["different ranks"]
        assert "some without square_norms, expected the same" in told["norms in one"]
        assert_same(ClassGradients.from_state_dict(told["norms in none"]), part([0], 0, norms=False), 0)
