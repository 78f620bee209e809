"""Empty pictures of runs and reports, for tests of what is around them: to draw the real ones takes a second a run."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from gradmix.training.reports import plots

PICTURES = ("curve", "heatmap", "alignment", "compare", "dots", "forest", "after_tasks", "sweep")


def draw_small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PICTURES:
        monkeypatch.setattr(plots, name, lambda *_args, **_named: Figure(figsize=(1, 1)))
