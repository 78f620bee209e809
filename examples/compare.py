"""No mixing, Mixup and GradMix on handwritten digits, in a loop of its own.

The current task's samples and the few kept ones are shuffled into one stream, so that old samples are rare in a batch:
the loop that most people write first. The threshold -1 lets every pair through, which is plain Mixup.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import gradmix

METHODS = {"no mixing": None, "Mixup": -1.0, "GradMix": 0.0}
SEEDS = 3

x, y = (torch.tensor(value) for value in load_digits(return_X_y=True))
x, test = x.float() / 16, torch.arange(len(x)) % 4 == 0


def train(threshold: float | None, seed: int) -> float:
    """Train on five tasks of two digits; return the accuracy on all digits."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    buffer = gradmix.ReplayBuffer(capacity=8)  # samples of each class
    mixup = None if threshold is None else gradmix.GradMix(model, buffer, threshold=threshold)
    for task in range(5):
        now = ~test & (y // 2 == task)
        data = TensorDataset(x[now], y[now])
        stream = ConcatDataset([data, TensorDataset(buffer.x, buffer.y)]) if len(buffer) else data
        for _ in range(10):
            for batch_x, batch_y in DataLoader(stream, batch_size=32, shuffle=True):
                if mixup is not None:
                    batch_x, batch_y = mixup(batch_x, batch_y)
                loss = F.cross_entropy(model(batch_x), batch_y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        buffer.add(x[now], y[now])
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


for name, threshold in METHODS.items():
    accuracy = torch.tensor([train(threshold, seed) for seed in range(SEEDS)])
    print(f"{name:10}  {accuracy.mean():.3f}  (seeds: {', '.join(f'{value:.3f}' for value in accuracy)})")
