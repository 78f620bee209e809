"""Imported before a framework's own main program: repeats every selection by ``select_pairs``, and counts.

``python -c "import witness; ..."`` prints at the end the number of steps, of those with replayed samples, and of pairs
that may not be mixed.
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401  (torchvision's operators)

import gradmix

select = gradmix.GradMix.select
counts = {"steps": 0, "replayed": 0, "rejected": 0}


def compared(self, x, y, *, replayed, outputs=None):
    before = self._source.get_state()
    pairs = select(self, x, y, replayed=replayed, outputs=outputs)
    own = torch.Generator()
    own.set_state(before)
    expected = gradmix.select_pairs(self._model, replayed, (x, y), outputs=outputs, generator=own)
    assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.lam, expected.lam)
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in self._model.modules()):
        # Without statistics of the batch, the step's own pass gives what a pass of the selection gives.
        own.set_state(before)
        expected = gradmix.select_pairs(self._model, replayed, (x, y), generator=own)
        assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.lam, expected.lam)
    counts["steps"] += 1
    counts["replayed"] += int(replayed.any())
    counts["rejected"] += int((pairs.alignment < 0).sum())
    return pairs


gradmix.GradMix.select = compared
atexit.register(lambda: print("witness", *counts.values()))
