"""Experience replay with GradMix for Mammoth (https://github.com/aimagelab/mammoth).

Copy this file to ``models/er_gradmix.py`` of a checkout and run ``python main.py --model er_gradmix`` with the
arguments of ``er``; Mammoth needs ``--batch_size`` for a name with an underscore. A step trains on current and
replayed samples and, for the other half of the loss, on their mixtures; pairs are selected from the outputs of the
step's own forward pass, against the replayed samples' gradient.
"""

import torch
from models.utils.continual_model import ContinualModel
from utils.args import add_rehearsal_args
from utils.buffer import Buffer

from gradmix import GradMix, HeadCapture


class ErGradMix(ContinualModel):
    """Experience replay, with selectively mixed samples."""

    NAME = "er_gradmix"
    COMPATIBILITY = ["class-il", "domain-il", "task-il", "general-continual"]  # noqa: RUF012

    @staticmethod
    def get_parser(parser):
        """Add the arguments of replay, and those of mixing."""
        add_rehearsal_args(parser)
        parser.add_argument("--mix_alpha", type=float, default=1.0, help="mixing weights are drawn from Beta(a, a)")
        parser.add_argument("--mix_originals", type=int, choices=(0, 1), default=1, help="train on unmixed samples too")
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__(backbone, loss, args, transform, dataset=dataset)
        self.buffer = Buffer(args.buffer_size)
        self.mixup = GradMix(self.net, None, alpha=args.mix_alpha)

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        """Take one step, then keep the current samples."""
        x, y = inputs, labels
        if not self.buffer.is_empty():
            old_x, old_y = self.buffer.get_data(self.args.minibatch_size, transform=self.transform, device=self.device)
            x, y = torch.cat([x, old_x]), torch.cat([y, old_y])
        replayed = torch.arange(len(y), device=y.device) >= len(labels)

        self.opt.zero_grad()
        if self.args.mix_originals:
            with HeadCapture(self.net, example=x[:1]) as capture:
                own = self.loss(self.net(x), y)
            mixed_x, mixed_y = self.mixup.select(x, y, outputs=capture.output, replayed=replayed).mix()
            loss = (own + self.loss(self.net(mixed_x), mixed_y)) / 2
        else:
            mixed_x, mixed_y = self.mixup(x, y, replayed=replayed)
            loss = self.loss(self.net(mixed_x), mixed_y)
        loss.backward()
        self.opt.step()

        self.buffer.add_data(examples=not_aug_inputs, labels=labels)
        return loss.item()
