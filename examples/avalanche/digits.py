"""Handwritten digits in Avalanche's own loop, with its replay, alone and with GradMixPlugin: five tasks of two digits.

The threshold -1 lets every pair through, which is plain Mixup. ``python digits.py SEEDS`` prints accuracies over all
digits after the last task, the mean and each seed's.
"""

import sys
import warnings

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

warnings.showwarning = lambda *_, **__: None  # Avalanche's, of names that it will change and of loggers
from avalanche.benchmarks import nc_benchmark  # noqa: E402
from avalanche.models import SimpleMLP  # noqa: E402
from avalanche.training import Naive  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin  # noqa: E402

from gradmix.integrations.avalanche import GradMixPlugin  # noqa: E402

x, y = (torch.tensor(value) for value in load_digits(return_X_y=True))
x, test = x.float() / 16, torch.arange(len(x)) % 4 == 0
data = [TensorDataset(x[part], y[part]) for part in (~test, test)]
for part in data:
    part.targets = part.tensors[1].tolist()
benchmark = nc_benchmark(*data, n_experiences=5, task_labels=False, fixed_class_order=list(range(10)))

METHODS = {
    "replay": None,
    "Mixup, mixed samples only": {"threshold": -1.0, "originals": False},
    "GradMix, mixed samples only": {"originals": False},
    "Mixup, with originals": {"threshold": -1.0},
    "GradMix, with originals (the default)": {},
}


def train(settings: dict | None, seed: int) -> float:
    """Train on all tasks; return the accuracy on all digits."""
    torch.manual_seed(seed)
    model = SimpleMLP(input_size=64, num_classes=10)
    plugins = [ReplayPlugin(mem_size=200)]
    if settings is not None:
        plugins.append(GradMixPlugin(**settings))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=32,
        train_epochs=5,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


if __name__ == "__main__":
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    for name, settings in METHODS.items():
        accuracy = torch.tensor([train(settings, seed) for seed in seeds])
        print(f"{name:38} {accuracy.mean():.3f}  ({', '.join(f'{value:.3f}' for value in accuracy)})", flush=True)
