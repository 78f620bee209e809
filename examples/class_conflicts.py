"""Class conflicts and influence by the gradient engine: what a step would do to a class or a sample, before it is made.

A network has learnt the digits 0 to 4 and begins with 5 to 9, without replay. Gradients of classes say which new digits
undo which old ones; gradients of samples say which of them turn the answer to one old sample. Both are then checked by
making the step.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import gradmix

torch.manual_seed(0)
x, y = (torch.tensor(value) for value in load_digits(return_X_y=True))
x, test = x.float() / 16, torch.arange(len(x)) % 4 == 0
train_x, train_y, test_x, test_y = x[~test], y[~test], x[test], y[test]
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def train(digits: range, steps: int) -> None:
    """Train on some digits alone."""
    now = torch.isin(train_y, torch.tensor(digits)).nonzero()[:, 0]
    for _ in range(steps):
        index = now[torch.randint(len(now), (32,))]
        loss = F.cross_entropy(model(train_x[index]), train_y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def losses_after_step(step_x: Tensor, step_y: Tensor, lr: float) -> Tensor:
    """Return the losses of the test samples after one step on some samples; the model stays as it is."""
    stepped = copy.deepcopy(model)
    F.cross_entropy(stepped(step_x), step_y).backward()
    torch.optim.SGD(stepped.parameters(), lr=lr).step()
    return F.cross_entropy(stepped(test_x), test_y, reduction="none").detach()


train(range(5), steps=200)
train(range(5, 10), steps=20)

# 1. Class conflicts. Below 0, a small step that helps one class harms the other. The network is small: no sketch.
new_classes = gradmix.class_gradients(model, (train_x[train_y >= 5], train_y[train_y >= 5]), sketch="identity")
old_classes = gradmix.class_gradients(model, (test_x[test_y < 5], test_y[test_y < 5]), sketch="identity")
cosine = F.normalize(old_classes.mean()) @ F.normalize(new_classes.mean()).T
print("cosine of an old digit's gradient (rows) with a new digit's (columns)")
print("      " + "".join(f"{digit:8}" for digit in range(5, 10)))
for digit, row in enumerate(cosine):
    print(f"{digit:6}" + "".join(f"{value:+8.2f}" for value in row))

# 2. The prediction is an inner product: a step on class b changes the loss of class a by -lr <g_a, g_b>.
old, new = divmod(int(cosine.argmin()), 5)
lr = 0.01
predicted = -lr * (old_classes.mean() @ new_classes.mean()[new])
before = losses_after_step(test_x, test_y, lr=0.0)
after = losses_after_step(train_x[train_y == new + 5], train_y[train_y == new + 5], lr)
print(f"a step on the digit {new + 5}: predicted and measured change of the old digits' losses")
for digit in range(5):
    measured = (after - before)[test_y == digit].mean()
    print(f"{digit:6}{predicted[digit]:+10.4f}{measured:+10.4f}")

# 3. Influence on one sample: an old one that is no longer recognised, and the new samples that are behind it.
lost = int(((test_y < 5) & (model(test_x).argmax(1) != test_y)).nonzero()[0])
recent_x, recent_y = train_x[train_y >= 5], train_y[train_y >= 5]
sample = gradmix.sample_gradients(model, (test_x[lost : lost + 1], test_y[lost : lost + 1]), sketch="identity")
influence = gradmix.sample_gradients(model, (recent_x, recent_y), sketch="identity").align(sample).inner
order = influence.argsort()
print(f"a {test_y[lost].item()} is now taken for a {model(test_x[lost]).argmax().item()}")
for name, chosen in (("most harmful", order[:10]), ("most helpful", order[-10:])):
    change = losses_after_step(recent_x[chosen], recent_y[chosen], lr)[lost] - before[lost]
    expected = -lr * influence[chosen].mean()
    print(f"  {name}: digits {recent_y[chosen].tolist()}, predicted {expected:+.4f}, measured {change:+.4f}")
