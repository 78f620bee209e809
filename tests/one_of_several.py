"""``gradmix`` in one of several processes, to which something happens at a step; a script of the tests.

The environment says what: ``HAPPENS`` is ``RANK SEED STEP WHAT``, with ``kill`` (by SIGKILL), ``error`` (a ValueError)
or ``tell`` (the step's number goes to the file ``at_step``, and from there on steps take a while).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gradmix import cli
from gradmix.training.loop import trainer
from gradmix.training.reports import plots


def main() -> int:
    # Pictures are not the matter here, and take a second each.
    for name in ("curve", "heatmap", "alignment", "compare"):
        setattr(plots, name, lambda _: Figure(figsize=(1, 1)))
    rank, seed, step, what = (os.environ.get("HAPPENS") or "-1 0 0 nothing").split()
    real = trainer.train_one

    def train_one(config: Any, method: Any, of_seed: int, *, on_step: Any, **others: Any) -> Any:
        def watched(progress: trainer.Progress) -> None:
            if os.environ["RANK"] == rank and of_seed == int(seed) and progress.step >= int(step):
                happen(what, progress.step)
            on_step(progress)

        return real(config, method, of_seed, on_step=watched, **others)

    trainer.train_one = train_one
    return cli.main()


def happen(what: str, step: int) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "error":
        raise ValueError("sample 7 is damaged")
    elif what == "tell":
        Path("at_step").write_text(str(step))
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
