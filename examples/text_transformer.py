"""Texts with a transformer and attention masks: inputs are dictionaries, and texts are mixed inside the model.

Token ids cannot be mixed. Each text passes the transformer with its own mask, and the pooled vectors are mixed at the
classifier's input, so that padding never counts. The texts are made here: six topics, each with words of its own among
words that all topics share; three tasks bring two topics each. This shows how it is done; whether it helps is a
question for several seeds (compare.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmix

TOPICS, OWN_WORDS, SHARED_WORDS, LENGTH, WIDTH = 6, 12, 60, 12, 32


def make_texts(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Return ids (N, LENGTH) int64, 0 for padding, their attention mask (N, LENGTH) bool, and topics (N,)."""
    topics = torch.arange(count) % TOPICS
    own = torch.randint(OWN_WORDS, (count, LENGTH), generator=generator)
    own += 1 + SHARED_WORDS + topics[:, None] * OWN_WORDS
    shared = torch.randint(1, 1 + SHARED_WORDS, (count, LENGTH), generator=generator)
    ids = torch.where(torch.rand(count, LENGTH, generator=generator) < 0.4, own, shared)
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (count, 1), generator=generator)
    return {"ids": ids * mask, "mask": mask}, topics


class Classifier(nn.Module):
    """A transformer of one layer, the mean over the tokens that the mask keeps, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + SHARED_WORDS + TOPICS * OWN_WORDS, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOPICS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (N, TOPICS) of ids (N, T) and their mask (N, T)."""
        h = self.encoder(self.embedding(ids), src_key_padding_mask=~mask)
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def part(x: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Return some of the texts."""
    return {name: value[index] for name, value in x.items()}


generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
x, y = make_texts(1200, generator)
test_x, test_y = make_texts(600, generator)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
buffer = gradmix.ReplayBuffer(capacity=20)  # texts of each topic
mixup = gradmix.GradMix(model, buffer)

for task in range(3):
    now = (y // 2 == task).nonzero()[:, 0]
    for _ in range(50):
        index = now[torch.randint(len(now), (16,))]
        batch_x, batch_y = part(x, index), y[index]
        if len(buffer):
            old_x, old_y = buffer.sample(16)
            batch_x = {name: torch.cat([batch_x[name], old_x[name]]) for name in batch_x}
            batch_y = torch.cat([batch_y, old_y])
        replayed = torch.arange(len(batch_y)) >= 16
        pairs = mixup.select(batch_x, batch_y, replayed=replayed)
        logits = gradmix.mixed_forward(model, "feature", batch_x, pairs.other_x(), pairs.lam)
        loss = F.cross_entropy(logits, pairs.mix_labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    buffer.add(part(x, now), y[now])

with torch.no_grad():
    right = model(**test_x).argmax(1) == test_y
print("accuracy by topic:", ", ".join(f"{right[test_y == topic].float().mean():.2f}" for topic in range(TOPICS)))
print(f"accuracy on all topics: {right.float().mean():.3f}")
