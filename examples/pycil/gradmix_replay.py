"""Replay with GradMix for PyCIL (https://github.com/LAMDA-CL/PyCIL).

Copy this file to ``models/gradmix_replay.py`` of a checkout, add to ``get_model`` of ``utils/factory.py``::

    elif name == "gradmix_replay":
        from models.gradmix_replay import GradMixReplay
        return GradMixReplay(args)

and run ``python main.py --config FILE`` with a copy of ``exps/replay.json`` in which ``model_name`` is
``gradmix_replay``. Its settings ``mix_alpha`` (1.0) and ``mix_originals`` (true) are optional.

A step trains on the samples of a batch and, for the other half of the loss, on their mixtures. PyCIL shuffles exemplars
and new samples into one stream; replayed are those of classes known before the task. Pairs are selected from the
outputs of the step's own forward pass, against the replayed samples' gradient.
"""

import logging
from contextlib import nullcontext

import torch.nn.functional as F
from models.replay import Replay, epochs, init_epoch
from torch import nn
from tqdm import tqdm

from gradmix import GradMix, HeadCapture


class GradMixReplay(Replay):
    """PyCIL's Replay, with selectively mixed samples."""

    def _init_train(self, train_loader, test_loader, optimizer, scheduler):
        self._fit(init_epoch, train_loader, test_loader, optimizer, scheduler)

    def _update_representation(self, train_loader, test_loader, optimizer, scheduler):
        self._fit(epochs, train_loader, test_loader, optimizer, scheduler)

    def _fit(self, count, train_loader, test_loader, optimizer, scheduler):
        # A classifier for each task: the network's is new.
        self._mixup = GradMix(self._network, None, alpha=self.args.get("mix_alpha", 1.0))
        for epoch in tqdm(range(count)):
            self._network.train()
            total_loss = correct = total = 0
            for _, x, y in train_loader:
                x, y = x.to(self._device), y.to(self._device)
                loss, predicted = self._loss(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total_loss += loss.item()
                if predicted is not None:
                    correct += int((predicted == y).sum())
                    total += len(y)
            scheduler.step()
            figures = f"loss {total_loss / len(train_loader):.3f}"
            if total:
                figures += f", training accuracy {100 * correct / total:.2f}"
            if epoch % 5 == 0 or epoch == count - 1:
                figures += f", test accuracy {self._compute_accuracy(self._network, test_loader):.2f}"
            logging.info(f"Task {self._cur_task}, epoch {epoch + 1}/{count}: {figures}")

    def _loss(self, x, y):
        """Return the loss of a batch, and the predictions for its unmixed samples; None without originals."""
        replayed = y < self._known_classes
        if not self.args.get("mix_originals", True):
            mixed_x, mixed_y = self._mixup(x, y, replayed=replayed)
            return F.cross_entropy(self._network(mixed_x)["logits"], mixed_y), None
        # On several GPUs the selection makes a pass of its own.
        several = isinstance(self._network, nn.DataParallel)
        with nullcontext() if several else HeadCapture(self._network, example=x[:1]) as capture:
            logits = self._network(x)["logits"]
        outputs = None if several else capture.output
        mixed_x, mixed_y = self._mixup.select(x, y, outputs=outputs, replayed=replayed).mix()
        mixed_loss = F.cross_entropy(self._network(mixed_x)["logits"], mixed_y)
        return (F.cross_entropy(logits, y) + mixed_loss) / 2, logits.argmax(1)
