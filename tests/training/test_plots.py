"""Pictures: they are drawn for every kind of run, and say what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh import run_python
from matplotlib.collections import PathCollection
from synthetic_runs import make_result

from gradmix.training.reports import figures, plots
from gradmix.training.runs.metrics import accuracy_on_seen
from gradmix.training.runs.results import AlignmentRecord, RunResult


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text))


def drawn(figure: Any, path: Path) -> np.ndarray:
    """The picture as saved, (H, W, channels)."""
    from matplotlib.image import imread

    figures.save(figure, path)
    return np.asarray(imread(path))


def with_table(cosine: np.ndarray, helpful: np.ndarray | None = None, threshold: float = 0.0) -> RunResult:
    size = len(cosine)
    helpful = np.nan_to_num(cosine) >= threshold if helpful is None else helpful
    record = AlignmentRecord(0, np.arange(size), cosine, helpful, threshold)
    return replace(make_result(tasks=1, per_task=size), alignments=(record,))


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"method": "er"},
        {"reached": 1},
        {"reached": 0, "steps": 0},
        {"tasks": 1},
        {"tasks": 10, "per_task": 1},
        {"tasks": 25, "per_task": 1, "method": "er"},
    ],
    ids=["plain", "no selection", "interrupted", "nothing reached", "one task", "ten tasks", "25 tasks"],
)
def test_every_run_can_be_drawn(case: dict[str, Any], tmp_path: Path) -> None:
    result = make_result(**case)
    for name in ("curve", "heatmap"):
        picture = drawn(getattr(plots, name)(result), tmp_path / f"{name}.png")
        assert picture.std() > 0.05, "the picture is not blank"
    assert {p.name for p in tmp_path.iterdir()} == {"curve.png", "heatmap.png"}


@pytest.mark.parametrize("classes", [1, 2, 7, 31, 100])
def test_alignment_from_few_to_many_classes(classes: int, tmp_path: Path) -> None:
    cosine = np.random.default_rng(0).normal(0, 0.2, (classes, classes))
    cosine[0, 0] = -0.3
    figure = plots.alignment(with_table(cosine))
    picture = drawn(figure, tmp_path / "a.png")
    assert max(picture.shape) < 4000
    crosses = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    assert len(crosses[0].get_offsets()) == int((cosine < 0).sum())
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert 1 <= len(labels) <= 60 and labels[0] == "digit 0"


def test_alignment_marks_decisions_not_signs() -> None:
    cosine = np.array([[0.2, 0.2], [0.2, np.nan]])
    helpful = np.array([[True, False], [True, False]])
    figure = plots.alignment(with_table(cosine, helpful, threshold=0.1))
    (crosses,) = (c for c in figure.axes[0].collections if isinstance(c, PathCollection))
    assert np.asarray(crosses.get_offsets()).tolist() == [[1.0, 0.0]], (
        "(partner, row) of the one rejected pair with rows"
    )
    for part in (
        "helpful (cosine ≥ 0.1)",
        "detrimental (cosine < 0.1)",
        "no samples of this pair",
        "digit 1",
        "gradmix-class",
    ):
        assert part in texts(figure)


def test_alignment_colours_meet_at_the_threshold() -> None:
    image = plots.alignment(with_table(np.array([[0.5, 0.1], [0.3, -0.4]]), threshold=0.3)).axes[0].images[0]
    norm = image.norm
    assert norm(0.3) == pytest.approx(0.5)
    red, _, blue, _ = image.cmap(norm(-0.4))
    assert red > blue, "detrimental is orange"
    red, _, blue, _ = image.cmap(norm(0.8))
    assert blue > red, "helpful is purple"


@pytest.mark.parametrize("cosine", [np.full((2, 2), np.nan), np.zeros((2, 2))], ids=["all empty", "all zero"])
def test_alignment_without_spread(cosine: np.ndarray, tmp_path: Path) -> None:
    drawn(plots.alignment(with_table(cosine)), tmp_path / "a.png")


def test_key_names_only_what_is_there() -> None:
    assert "no samples" not in texts(plots.alignment(with_table(np.array([[0.1, -0.1], [0.2, 0.3]]))))


def test_alignment_needs_a_table() -> None:
    with pytest.raises(ValueError, match="without alignments"):
        plots.alignment(make_result("er"))


def test_heatmap_numbers_and_empty_cells() -> None:
    result = make_result(reached=2)
    shown = texts(plots.heatmap(result))
    assert f"{result.accuracy[1, 0]:.2f}" in shown and "nan" not in shown and "not measured" in shown
    assert "not measured" not in texts(plots.heatmap(make_result()))


def test_compare_draws_one_line_a_method_with_a_band() -> None:
    results = [make_result(m, s) for m in ("er", "mixup") for s in (0, 1, 2)] + [make_result("gradmix-class", 0)]
    results.append(make_result("gradmix-class", 1, reached=1))
    axes = plots.compare(results).axes[0]
    lines = {line.get_label().split(":")[0]: np.asarray(line.get_ydata()) for line in axes.lines}
    assert list(lines) == ["er", "mixup", "gradmix-class"]
    expected = np.mean([accuracy_on_seen(r.accuracy) for r in results[:3]], axis=0)
    np.testing.assert_allclose(lines["er"], expected)
    assert len(axes.collections) == 2, "a band needs two seeds"
    assert len({line.get_marker() for line in axes.lines}) == 3


def test_compare_with_nothing_complete(tmp_path: Path) -> None:
    drawn(plots.compare([make_result(reached=1), make_result("er", reached=0, steps=0)]), tmp_path / "c.png")


def test_same_run_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figures.save(plots.alignment(make_result()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys, gradmix.training.reports.plots as p; assert 'matplotlib' not in sys.modules;"
        "import numpy as np; from pathlib import Path; p._figure(1, 1); assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert run_python(code) == []
