"""Several processes that train one model: each has its own batches, and all share the reference gradient.

``python examples/several_processes.py`` starts two processes on the CPU, which talk over gloo; ``torchrun
--nproc-per-node 2 examples/several_processes.py`` does the same. On GPUs use the backend nccl and a device each.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import gradmix

PROCESSES = 2


def train(rank: int, meeting: str) -> None:
    """Train as one of the processes; the first one prints the accuracy."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)  # the same initial weights and, below, the same buffer
    x, y = (torch.tensor(value) for value in load_digits(return_X_y=True))
    x, test = x.float() / 16, torch.arange(len(x)) % 4 == 0
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = gradmix.ReplayBuffer(capacity=8)
    # Each process reads its share of the buffer, and all get the same reference gradient, to the bit.
    mixup = gradmix.GradMix(model, buffer, group=dist.group.WORLD)
    own = torch.Generator().manual_seed(1 + rank)  # other batches and replayed samples in each process

    for task in range(5):
        now = ~test & (y // 2 == task)
        new_x, new_y = x[now], y[now]
        for _ in range(30):
            index = torch.randint(len(new_x), (32,), generator=own)
            batch_x, batch_y = new_x[index], new_y[index]
            if len(buffer):
                old_x, old_y = buffer.sample(32, generator=own)
                batch_x, batch_y = torch.cat([batch_x, old_x]), torch.cat([batch_y, old_y])
            batch_x, batch_y = mixup(batch_x, batch_y)
            loss = F.cross_entropy(model(batch_x), batch_y)
            optimizer.zero_grad()
            loss.backward()  # gradients are averaged over the processes
            optimizer.step()
        buffer.add(new_x, new_y)  # all processes add the same samples

    references = [torch.empty_like(mixup.reference) for _ in range(PROCESSES)]
    dist.all_gather(references, mixup.reference)
    if rank == 0:
        print("same reference gradient everywhere:", all(torch.equal(references[0], other) for other in references))
        print(f"accuracy on all classes: {(network(x[test]).argmax(1) == y[test]).float().mean():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # by torchrun
        PROCESSES = int(os.environ["WORLD_SIZE"])
        train(int(os.environ["RANK"]), "env://")
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (f"file://{folder}/meeting",), nprocs=PROCESSES)
