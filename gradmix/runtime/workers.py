"""The refusal of calls in worker processes of a DataLoader, whose copy of the model is not trained."""

from __future__ import annotations

import torch


def refuse_worker(what: str) -> None:
    """Refuse a call in a worker process of a DataLoader, which has a copy of the model from its start.

    Raises:
        RuntimeError: this is such a process.
    """
    if torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            f"{what}: was called in a worker process of a DataLoader, whose copy of the model and of the buffer stays "
            "as it was when the worker was started, expected a call in the training loop, on the batch that the loader "
            "gives"
        )
