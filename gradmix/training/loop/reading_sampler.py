"""Steps of samples that are read from files: drawn ahead, decoded by worker processes while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmix.replay.buffer import BufferSamples
from gradmix.runtime.collectives import all_gather_samples
from gradmix.runtime.transfer import to_device_async
from gradmix.training.data.samples import Samples, StoredSamples
from gradmix.training.loop.sampler import StepSampler
from gradmix.training.loop.sharding import Share
from gradmix.training.loop.state_checks import require_like, require_number, require_tensor
from gradmix.training.methods import StepSamples


@dataclass(frozen=True)
class _Plan:
    """The plan of a step: items of the data set, part after part, with their labels.

    Attributes:
        items: ``(n,)`` int64.
        y: ``(n,)`` int64.
        sizes: Items of each part: current samples, replayed ones, candidates, and more replayed ones.
        replayed: ``(n,)`` bool, the samples that come from the buffer, of current and replayed ones.
        extras: What was kept in the buffer with the last part.
    """

    items: Tensor
    y: Tensor
    sizes: tuple[int, ...]
    replayed: Tensor
    extras: dict[str, Tensor]


class ReadingSampler(StepSampler):
    """Draws steps from items of a data set; the buffer holds the items' numbers in their place.

    What a step is made of is drawn before it is wanted, so that it can be read meanwhile. The draws are those that
    would have been made then, because the buffer changes between tasks only; a run that is left takes those not yet
    used with it, and which items it has found damaged, for these are not shown to the buffer.
    """

    _train: StoredSamples

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._everything = self._everything_y = torch.empty(0, dtype=torch.int64)
        self._pending: deque[_Plan] = deque()
        self._drawn = 0
        self._damaged: dict[int, str] = {}
        self._extra: BufferSamples | None = None

    def _turn_to(self, train: Samples) -> None:
        assert isinstance(train, StoredSamples)
        self._train = train
        found = self._reading.faults_of(train.items)
        found.update(self._damaged)
        self._damaged = found
        self._everything, self._everything_y = train.at, train.y
        if self._mingles:
            self._everything = torch.cat([self._everything, self._buffer.x])
            self._everything_y = torch.cat([self._everything_y, self._buffer.y])

    def start_epoch(self, order: Tensor, done: int) -> None:
        self.close()
        self._learn_of_damage()
        self._batches = order.split(self._batch)
        # What was drawn ahead when the run was left is not drawn again.
        self._drawn = done + len(self._pending)
        self._read(self._train.items, self._plans())

    def _learn_of_damage(self) -> None:
        """Know what other processes found too: the buffer is to be shown the same samples everywhere."""
        if self._group is not None and self._reading.skips_damaged:
            mine = torch.tensor(sorted(self._damaged), dtype=torch.int64)
            for item in all_gather_samples(mine.to(self._device), self._group).tolist():
                self._damaged.setdefault(item, "found by another process")

    def _plans(self) -> Iterator[Tensor]:
        for plan in tuple(self._pending):
            yield self._to_read(plan)
        while self._drawn < len(self._batches):
            plan = self._draw(self._batches[self._drawn])
            self._drawn += 1
            self._pending.append(plan)
            yield self._to_read(plan)

    def _to_read(self, plan: _Plan) -> Tensor:
        """The items that this process is to read."""
        return plan.items if self._group is None else plan.items[self._share(plan).mine]

    def _share(self, plan: _Plan) -> Share:
        return Share.of(list(plan.sizes), self._group, torch.device("cpu"))

    def _draw(self, index: Tensor) -> _Plan:
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        replayed, candidates, more, extras = nothing, nothing, nothing, dict[str, Tensor]()
        if self._replays and len(self._buffer) and not self._shuffled:
            replayed = self._buffer.sample(self._replay_batch)
        step = len(index) + len(replayed[1])
        from_buffer = torch.arange(step) >= len(index)
        from_buffer[: len(index)] = index >= len(self._train)
        if self._balanced:
            places, count = self._draw_places(step)
            x, y = self._train.at[places], self._train.y[places]
            if count:
                drawn = self._buffer.draw_balanced(count, self.generators["candidates"])
                x, y = torch.cat([x, drawn[0]]), torch.cat([y, drawn[1]])
            candidates = x, y
        if self._more and len(self._buffer):
            x, y, extras = self._buffer.sample_with_extras(self._replay_batch, self.generators["replay"])
            more = x, y
        current = self._everything[index], self._everything_y[index]
        items, labels = zip(current, replayed, candidates, more, strict=True)
        return _Plan(torch.cat(items), torch.cat(labels), tuple(map(len, labels)), from_buffer, extras)

    def samples(self) -> StepSamples:
        read = next(self._batches_read)
        plan = self._pending.popleft()
        x, kept = read.samples.to(self._device, non_blocking=True), read.kept
        places = torch.arange(len(plan.y))
        share = None
        if self._group is not None:
            share = self._share(plan)
            if self._gathers:
                # Where none are left out there is nothing to be asked for, and to wait for.
                x, kept = share.gather_partial(x, kept) if self._reading.skips_damaged else (share.gather(x), None)
            else:
                places = share.mine
        if kept is not None:
            places = places[kept]
        return self._make_step(plan, x, places, share is not None)

    def _make_step(self, plan: _Plan, x: Tensor, places: Tensor, shared: bool) -> StepSamples:
        """The step of those samples of a plan that were read, ``x (n, ...)`` at ``places (n,)``."""
        starts = torch.tensor([0, *plan.sizes]).cumsum(0).tolist()
        part_of = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
        sizes = torch.bincount(part_of, minlength=4).tolist()
        y = to_device_async(plan.y[places], self._device)
        xs, ys, at = x.split(sizes), y.split(sizes), places.split(sizes)
        self._extra = None
        if plan.sizes[3]:
            own = at[3] - starts[3]
            extras = {name: to_device_async(value[own], self._device) for name, value in plan.extras.items()}
            more = BufferSamples(self._as_seen(xs[3], "replay augmentation", plan.sizes[3], own), ys[3], extras)
            if shared and self._gathers:
                mine = Share.of([sizes[3]], self._group, self._device).mine
                more = BufferSamples(more.x[mine], more.y[mine], {name: value[mine] for name, value in extras.items()})
            self._extra = more
        step, count = torch.cat(at[:2]), plan.sizes[0] + plan.sizes[1]
        step_x, step_y = self._as_seen(torch.cat(xs[:2]), "augmentation", count, step), torch.cat(ys[:2])
        candidates = None
        if plan.sizes[2]:
            candidates = self._as_seen(xs[2], "candidate augmentation", plan.sizes[2], at[2] - starts[2]), ys[2]
        elif self._candidates == "replayed" and sizes[1]:
            candidates = step_x[sizes[0] :], ys[1]
        replayed = to_device_async(plan.replayed[step], self._device)
        if not shared:
            return StepSamples(step_x, step_y, self._weights(sizes[0], sizes[1]), candidates, replayed)
        if self._gathers:
            share = Share.of(sizes[:2], self._group, self._device)
            return StepSamples(step_x, step_y, self._weights(sizes[0], sizes[1]), candidates, replayed, share)
        weight = self._weights(plan.sizes[0], plan.sizes[1])[to_device_async(step, self._device)]
        return StepSamples(step_x, step_y, weight, candidates, replayed)

    def _as_seen(self, x: Tensor, purpose: str, count: int, places: Tensor) -> Tensor:
        """Samples at ``places (n,)`` of ``count`` as the model is to see them; numbers are drawn for all of these."""
        among = None if len(places) == count else (count, places)
        return self._preparation.for_training(x, self.generators[purpose], among)

    def own_samples(self) -> Iterable[tuple[Tensor, Tensor]]:
        self._learn_of_damage()
        damaged = torch.tensor(sorted(self._damaged), dtype=torch.int64)
        places = (~torch.isin(self._train.at, damaged)).nonzero().squeeze(1)
        return [(self._train.at[places], self._train.y[places])]

    def step_samples(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("a buffer of items' numbers does not change between the steps of a task")

    def draw_replayed(self) -> BufferSamples | None:
        extra, self._extra = self._extra, None
        return extra

    def state_dict(self) -> dict[str, Any]:
        pending = [vars(plan) | {"sizes": list(plan.sizes)} for plan in self._pending]
        return {"pending": pending, "damaged": dict(self._damaged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for item, fault in state["damaged"].items():
            require_number(item, 0, 2**63, "sampler.damaged")
            require_like(fault, "", "sampler.damaged")
        for plan in state["pending"]:
            samples = len(require_tensor(plan["items"], torch.int64, (None,), "sampler.pending.items"))
            require_tensor(plan["y"], torch.int64, (samples,), "sampler.pending.y")
            require_like(plan["sizes"], [0] * 4, "sampler.pending.sizes")
            require_tensor(plan["replayed"], torch.bool, (sum(plan["sizes"][:2]),), "sampler.pending.replayed")
            if min(plan["sizes"]) < 0 or sum(plan["sizes"]) != samples or int(min(plan["y"], default=0)) < 0:
                raise ValueError("sampler.pending: got parts that do not make up its samples")
            for kept in plan["extras"].values():
                if len(kept) != plan["sizes"][3]:
                    raise ValueError("sampler.pending.extras: got another number of samples than are replayed")
        self._pending = deque(_Plan(**(plan | {"sizes": tuple(plan["sizes"])})) for plan in state["pending"])
        self._damaged = dict(state["damaged"])
