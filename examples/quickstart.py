"""A class-incremental run on handwritten digits, in a loop of its own: five tasks of two classes."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradmix

x, y = (torch.tensor(value) for value in load_digits(return_X_y=True))
x, test = x.float() / 16, torch.arange(len(x)) % 4 == 0
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
buffer = gradmix.ReplayBuffer(capacity=8)  # samples of each class
mixup = gradmix.GradMix(model, buffer)

for task in range(5):
    now = ~test & (y // 2 == task)
    new_x, new_y = x[now], y[now]
    for _ in range(100):
        index = torch.randint(len(new_x), (32,))
        batch_x, batch_y = new_x[index], new_y[index]
        if len(buffer):
            old_x, old_y = buffer.sample(32)
            batch_x, batch_y = torch.cat([batch_x, old_x]), torch.cat([batch_y, old_y])
        batch_x, batch_y = mixup(batch_x, batch_y)  # before there is a buffer: plain Mixup
        loss = F.cross_entropy(model(batch_x), batch_y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    buffer.add(new_x, new_y)

print(f"accuracy on all classes: {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
