"""DER++ with GradMix for Mammoth (https://github.com/aimagelab/mammoth).

Copy this file to ``models/derpp_gradmix.py`` of a checkout and run ``python main.py --model derpp_gradmix`` with the
arguments of ``derpp``; Mammoth needs ``--batch_size`` for a name with an underscore. Half of the loss on labels, of
current and of replayed samples, is that of their mixtures; kept logits are reproduced for unmixed samples. Pairs are
selected from the outputs of the step's own forward pass.
"""

import torch
import torch.nn.functional as F
from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer

from gradmix import GradMix, HeadCapture


class DerppGradMix(ContinualModel):
    """Dark experience replay, with selectively mixed samples."""

    NAME = "derpp_gradmix"
    COMPATIBILITY = ["class-il", "domain-il", "task-il", "general-continual"]  # noqa: RUF012

    @staticmethod
    def get_parser(parser):
        """Add the arguments of replay and of DER++, and that of mixing."""
        add_rehearsal_args(parser)
        parser.add_argument("--alpha", type=float, required=True, help="weight of the kept logits")
        parser.add_argument("--beta", type=float, required=True, help="weight of the replayed samples' labels")
        parser.add_argument("--mix_alpha", type=float, default=1.0, help="mixing weights are drawn from Beta(a, a)")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)
        self.mixup = GradMix(self.net, None, alpha=args.mix_alpha)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        """Take one step, then keep the current samples and their logits."""
        count, kept_loss = len(labels), 0.0
        x, y = inputs, labels
        if not self.buffer.is_empty():
            kept_x, _, kept_logits = self._draw()
            kept_loss = self.args.alpha * F.mse_loss(self.net(kept_x), kept_logits)
            old_x, old_y, _ = self._draw()
            x, y = torch.cat([x, old_x]), torch.cat([y, old_y])

        self.opt.zero_grad()
        with HeadCapture(self.net, example=x[:1]) as capture:
            logits = self.net(x)
        replayed = torch.arange(len(y), device=y.device) >= count
        mixed_x, mixed_y = self.mixup.select(x, y, outputs=capture.output, replayed=replayed).mix()
        label_loss = (self._label_loss(logits, y, count) + self._label_loss(self.net(mixed_x), mixed_y, count)) / 2
        loss = label_loss + kept_loss
        loss.backward()
        self.opt.step()

        self.buffer.add_data(examples=not_aug_inputs, labels=labels, logits=logits[:count].detach())
        return loss.item()

    def _draw(self):
        return self.buffer.get_data(self.args.minibatch_size, transform=self.transform, device=self.device)

    def _label_loss(self, logits, y, count):
        """Return the mean loss of the current samples, the first ``count``, and beta times that of the others."""
        loss = self.loss(logits[:count], y[:count])
        return loss if len(y) == count else loss + self.args.beta * self.loss(logits[count:], y[count:])
