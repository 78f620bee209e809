"""The replay buffer: a small, fair sample of everything seen so far.

Every row seen is given an independent uniform key, and the rows with the smallest keys within a quota are held. The
k smallest of n independent keys sit at a uniformly random set of k rows, so what is held is a uniform sample without
replacement of what was seen, however the rows were split into calls. The policies differ only in the quota.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradmix.graphs import sent

BufferPolicy = Literal["class", "balanced", "reservoir"]

_STATE_VERSION = 2
_STATES_READ = (1, 2)  # 1: without extra columns


class BufferRows(NamedTuple):
    """Rows drawn from a buffer, with all that is kept with them.

    Attributes:
        x: ``(n, ...)`` inputs.
        y: ``(n,)`` int64 labels.
        extras: ``(n, ...)`` by the name given to :meth:`ReplayBuffer.add`; empty if nothing was given.
    """

    x: Tensor
    y: Tensor
    extras: dict[str, Tensor]


class ReplayBuffer:
    """A replay buffer that holds a uniform sample of the rows seen, within a quota set by its policy.

    Policies:

    - ``class``: ``capacity`` rows of every class; the buffer grows with the number of classes.
    - ``balanced``: ``capacity`` rows in total, shared equally by the classes seen. A class with fewer rows than its
      share leaves the rest to the others, so the buffer is full as soon as ``capacity`` rows were seen. A remainder
      goes one row each to the classes with the smallest labels.
    - ``reservoir``: ``capacity`` rows in total, a uniform sample of the stream whatever the classes.

    What is held depends on the seed and on the sequence of rows alone: not on how the rows were split into calls of
    :meth:`add`, not on the device, not on how often the buffer was sampled. No global random state is read or changed.

    Anything else known of a row can be kept with it, under a name of the caller's: extra columns, which follow their
    rows through every policy. DER++ keeps the logits that the model gave a row when it was added, and later trains it
    to give them again.

    Args:
        capacity: Rows per class for policy ``class``, rows in total otherwise; at least 1.
        policy: One of the three above.
        device: Where the rows are kept; ``None``: where the first rows added lie.
        seed: Seeds the keys and, apart from them, the draws of :meth:`sample` and :meth:`draw_balanced`.

    Raises:
        TypeError: ``capacity`` or ``seed`` is not an integer.
        ValueError: ``capacity`` is below 1 or ``policy`` is unknown.

    Example:
        >>> buffer = ReplayBuffer(2, policy="class", seed=0)
        >>> buffer.add(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 0, 1, 1, 5]))
        >>> len(buffer), buffer.seen, buffer.class_counts()
        (5, 6, {0: 2, 1: 2, 5: 1})
        >>> x, y = buffer.sample(3)
        >>> x.shape, y.shape
        (torch.Size([3, 2]), torch.Size([3]))
        >>> buffer
        ReplayBuffer(capacity=2, policy='class', held=5, seen=6, classes=3, device=cpu)

        With logits kept, as DER++ does:

        >>> buffer = ReplayBuffer(2, policy="class", seed=0)
        >>> buffer.add(torch.rand(6, 2), torch.tensor([0, 0, 0, 1, 1, 5]), logits=torch.rand(6, 10))
        >>> rows = buffer.sample_rows(3)
        >>> rows.x.shape, rows.extras["logits"].shape
        (torch.Size([3, 2]), torch.Size([3, 10]))
    """

    def __init__(
        self,
        capacity: int,
        *,
        policy: BufferPolicy = "class",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        _check_int("capacity", capacity, minimum=1)
        _check_int("seed", seed)
        if policy not in get_args(BufferPolicy):
            raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(map(repr, get_args(BufferPolicy)))}")
        self._capacity = int(capacity)
        self._policy: BufferPolicy = policy
        self._device = None if device is None else torch.device(device)
        # Two generators: how often the buffer is sampled must not change what it holds.
        self._key_generator = torch.Generator().manual_seed(_derived_seed(seed, "keys"))
        self._draw_generator = torch.Generator().manual_seed(_derived_seed(seed, "draws"))
        # The ledger lies on the CPU, in order of arrival, one entry per row held; the rows themselves lie in the
        # columns "x", "y" and the extra ones on the buffer's device, at `_slots`. Decisions never wait for the rows,
        # and nothing depends on the slots, nor on the columns' spare room: they need not be saved.
        self._keys = torch.empty(0, dtype=torch.float64)
        self._labels = torch.empty(0, dtype=torch.int64)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._columns: dict[str, Tensor] | None = None
        self._classes = torch.empty(0, dtype=torch.int64)
        self._seen = torch.empty(0, dtype=torch.int64)

    # ---------------------------------------------------------------------------------------------- what it holds

    @property
    def capacity(self) -> int:
        """Rows per class for policy ``class``, rows in total otherwise."""
        return self._capacity

    @property
    def policy(self) -> BufferPolicy:
        """The policy that sets the quota."""
        return self._policy

    @property
    def device(self) -> torch.device | None:
        """Where the rows are kept; ``None`` while that is still open, before the first rows."""
        return self._device

    @property
    def x(self) -> Tensor:
        """The inputs held, ``(len, ...)``, in order of arrival; of shape ``(0,)`` before the first :meth:`add`.

        It shares memory with the buffer: read it before the next :meth:`add`, and do not write to it.
        """
        columns = self._compact()
        return torch.empty(0, device=self._device) if columns is None else columns["x"][: len(self)]

    @property
    def y(self) -> Tensor:
        """The labels held, ``(len,)`` int64, in the order of :attr:`x`; it shares memory with the buffer."""
        columns = self._compact()
        if columns is None:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        return columns["y"][: len(self)]

    @property
    def extras(self) -> dict[str, Tensor]:
        """What is kept with the rows, ``(len, ...)`` by name, in the order of :attr:`x`; it shares memory as that does.

        Empty before the first :meth:`add`, and if that was given none.
        """
        return _extras_of(self._compact() or {}, len(self))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def seen(self) -> int:
        """Rows seen so far, held or not."""
        return int(self._seen.sum())

    @property
    def seen_per_class(self) -> dict[int, int]:
        """Rows seen so far of every class, by label."""
        return dict(zip(self._classes.tolist(), self._seen.tolist(), strict=True))

    @property
    def classes(self) -> tuple[int, ...]:
        """Labels of which at least one row is held, in ascending order."""
        return tuple(torch.unique(self._labels).tolist())

    def class_counts(self) -> dict[int, int]:
        """Rows held of every class of which there is at least one, by label."""
        classes, counts = torch.unique(self._labels, return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist(), strict=True))

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer(capacity={self._capacity}, policy={self._policy!r}, held={len(self)}, seen={self.seen}, "
            f"classes={len(self._classes)}, device={self._device})"
        )

    # -------------------------------------------------------------------------------------------------- filling it

    def add(self, x: Tensor, y: Tensor, **extras: Tensor) -> None:
        """Shows rows to the buffer, which keeps copies of those within the quota.

        Which rows are kept is decided on their keys alone; only those are copied, so rows that are turned away cost
        next to nothing.

        Args:
            x: Inputs ``(N, ...)``, on any device; kept detached. The first call fixes the shape and dtype of a row.
            y: Labels ``(N,)``, integers of at least 0, on any device.
            extras: Tensors ``(N, ...)`` kept with the rows, by name, on any device; kept detached. The first call fixes
                the names, and the shape and dtype of each one's rows.

        Raises:
            TypeError: An argument is not a tensor, or ``y`` does not hold integers, or a dtype is not that of the rows
                held.
            ValueError: The shapes do not fit each other or the rows held, a label is negative, or the names of
                ``extras`` are not those of the first call.
        """
        labels = self._check_rows(x, y, extras)
        if self._columns is None:
            self._columns = self._opened(x, extras)
        if len(labels) == 0:
            return
        keys = torch.rand(len(labels), dtype=torch.float64, generator=self._key_generator)
        classes, seen = self._count(labels)
        held = len(self)
        all_keys, all_labels = torch.cat([self._keys, keys]), torch.cat([self._labels, labels])
        keep = _smallest_keys(all_keys, all_labels, self._policy, self._capacity, classes, seen)
        old, new = keep[:held], keep[held:].nonzero().squeeze(1)
        slots = self._slots[old]
        if len(new) > 0:
            self._columns, slots_new = self._with_room(self._columns, slots, len(new))
            for name, rows in {"x": x, "y": labels, **extras}.items():
                column = self._columns[name]
                values = rows.detach().index_select(0, new.to(rows.device)).to(column.device)
                column.index_copy_(0, slots_new.to(column.device), values)
            slots = torch.cat([slots, slots_new])
        self._keys, self._labels, self._slots = all_keys[keep], all_labels[keep], slots
        self._classes, self._seen = classes, seen

    def _check_rows(self, x: Tensor, y: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Checks the arguments of :meth:`add` and returns the labels as int64 on the CPU, never the caller's own."""
        for name, value in {"x": x, "y": y, **extras}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
        if x.dim() < 1:
            raise ValueError("x: got a tensor without dimensions, expected shape (N, ...)")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y: got shape {tuple(y.shape)}, expected ({x.shape[0]},), one label for every row of x")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"y: got dtype {y.dtype}, expected integer labels (int64)")
        for name, value in extras.items():
            if value.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected ({x.shape[0]}, ...), an entry for every row of x"
                )
        if self._columns is not None:
            self._check_alike({"x": x, **extras}, self._columns)
        labels = y.detach().to("cpu", torch.int64)
        if len(labels) > 0 and int(labels.min()) < 0:
            raise ValueError(f"y: got label {int(labels.min())}, expected labels of at least 0")
        return labels

    @staticmethod
    def _check_alike(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
        """Refuses other names, shapes or dtypes than those of the first rows."""
        expected = columns.keys() - {"y"}
        if rows.keys() != expected:
            got, before = (", ".join(sorted(names - {"x"})) or "none" for names in (rows.keys(), expected))
            raise ValueError(f"extras: got {got}, expected {before} as with the rows added before")
        for name, value in rows.items():
            column = columns[name]
            if value.shape[1:] != column.shape[1:]:
                raise ValueError(
                    f"{name}: got rows of shape {tuple(value.shape[1:])}, expected {tuple(column.shape[1:])} "
                    "as in the rows added before"
                )
            if value.dtype != column.dtype:
                raise TypeError(f"{name}: got dtype {value.dtype}, expected {column.dtype} as in the rows added before")

    def _count(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classes ``(P,)``, ascending, and rows seen of each ``(P,)``, with ``labels`` counted in."""
        new_classes, new_counts = torch.unique(labels, return_counts=True)
        classes = torch.unique(torch.cat([self._classes, new_classes]))
        seen = torch.zeros_like(classes)
        seen[torch.searchsorted(classes, self._classes)] += self._seen
        seen[torch.searchsorted(classes, new_classes)] += new_counts
        return classes, seen

    def _opened(self, x: Tensor, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Columns without rows, of the first rows' device, names, row shapes and dtypes; room comes by need."""
        if self._device is None:
            self._device = x.device
        columns = {
            name: torch.empty((0, *value.shape[1:]), dtype=value.dtype, device=self._device)
            for name, value in {"x": x, **extras}.items()
        }
        return columns | {"y": torch.empty(0, dtype=torch.int64, device=self._device)}

    def _with_room(self, columns: dict[str, Tensor], used: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """The columns, enlarged where needed, and ``count`` of their slots outside ``used``, ``(count,)``."""
        rows, needed = len(columns["y"]), len(used) + count
        if needed > rows:
            # Doubling keeps the copying of many small calls linear; a total capacity is never exceeded.
            rows = max(needed, 2 * rows)
            if self._policy != "class":
                rows = min(rows, self._capacity)
            columns = {name: _enlarged(column, rows) for name, column in columns.items()}
        free = torch.ones(rows, dtype=torch.bool)
        free[used] = False
        return columns, free.nonzero().squeeze(1)[:count]

    def _compact(self) -> dict[str, Tensor] | None:
        """The columns, in order of arrival: brought into it when rows are read, so that adding need not move any."""
        in_order = torch.arange(len(self))
        if self._columns is not None and not torch.equal(self._slots, in_order):
            at = self._slots.to(self._columns["y"].device)
            self._columns = {name: column.index_select(0, at) for name, column in self._columns.items()}
            self._slots = in_order
        return self._columns

    # ---------------------------------------------------------------------------------------------- drawing from it

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws rows uniformly: without replacement while there are enough, with replacement when ``n > len(self)``.

        Args:
            n: Rows to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)`` and ``y (n,)`` int64, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        rows = self.sample_rows(n, generator)
        return rows.x, rows.y

    def sample_rows(self, n: int, generator: torch.Generator | None = None) -> BufferRows:
        """The same draw as :meth:`sample`, with what is kept with the rows: one generator, the same rows.

        Args:
            n: Rows to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)``, ``y (n,)`` int64 and ``extras`` by name ``(n, ...)``, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        generator = self._draw_generator if generator is None else generator
        held = len(self)
        if n <= held:
            rows = torch.randperm(held, generator=generator, device=generator.device)[:n]
        else:
            rows = torch.randint(held, (n,), generator=generator, device=generator.device)
        return self._take(rows)

    def draw_balanced(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws rows class-balanced: every class held gets ``n // P`` or one more of the ``n`` rows, in random order.

        Which of the ``P`` classes get one more is random. Within a class rows are drawn without replacement; where a
        class has too few, each of its rows comes up equally often, up to one.

        Args:
            n: Rows to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)`` and ``y (n,)`` int64, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        generator = self._draw_generator if generator is None else generator
        device = generator.device
        if n == 0:
            return self._take(torch.empty(0, dtype=torch.int64))[:2]
        classes, counts = torch.unique(self._labels, return_counts=True)
        # A random order within every class: sorted by label, shuffled beforehand.
        shuffled = torch.randperm(len(self), generator=generator, device=device).cpu()
        by_class = shuffled[torch.argsort(self._labels[shuffled], stable=True)]
        starts = torch.cumsum(counts, 0) - counts
        # Draw number d goes to class d mod P of a random order of classes, as that class's draw number d div P.
        draws = torch.arange(n)
        which = torch.randperm(len(classes), generator=generator, device=device).cpu()[draws % len(classes)]
        rows = by_class[starts[which] + (draws // len(classes)) % counts[which]]
        return self._take(rows[torch.randperm(n, generator=generator, device=device).cpu()])[:2]

    def _check_draw(self, n: int) -> None:
        _check_int("n", n, minimum=0)
        if n > 0 and len(self) == 0:
            raise ValueError(f"n: got {n}, but the buffer is empty; add rows before drawing any")

    def _take(self, rows: Tensor) -> BufferRows:
        """Copies of the rows at places ``rows (n,)`` of the ledger."""
        if self._columns is None:
            return BufferRows(self.x, self.y, {})
        at = sent(self._slots[rows.cpu()], self._columns["y"].device)
        taken = {name: column.index_select(0, at) for name, column in self._columns.items()}
        return BufferRows(taken["x"], taken["y"], _extras_of(taken, len(rows)))

    # ------------------------------------------------------------------------------------------ moving and keeping it

    def to(self, device: torch.device | str) -> ReplayBuffer:
        """Moves the rows to ``device`` and returns the buffer itself; what it holds and will hold stays the same."""
        self._device = torch.device(device)
        if self._columns is not None:
            self._columns = {name: column.to(self._device) for name, column in self._columns.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically: rows with their extras, keys, seen counts, both generators' states.

        The values are tensors, integers, one string and one dict of tensors, so that
        ``torch.load(..., weights_only=True)`` reads them.
        Tensors are copies.
        """
        return {
            "version": _STATE_VERSION,
            "capacity": self._capacity,
            "policy": str(self._policy),
            "opened": int(self._columns is not None),
            "x": self.x.clone(),
            "y": self.y.clone(),
            "extras": {name: value.clone() for name, value in self.extras.items()},
            "keys": self._keys.clone(),
            "seen_classes": self._classes.clone(),
            "seen_counts": self._seen.clone(),
            "key_generator": self._key_generator.get_state(),
            "draw_generator": self._draw_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state made by :meth:`state_dict`; rows go to this buffer's device, or stay where they lie.

        Args:
            state: As :meth:`state_dict` gives it, of a buffer with the same capacity and policy. It is not kept. One of
                version 1 has no extras.

        Raises:
            ValueError: An entry is missing or does not fit this buffer or the other entries; the buffer is unchanged.
        """
        missing = sorted(_STATE_KEYS - set(state))
        if missing:
            raise ValueError(f"state: lacks {', '.join(missing)}; expected what ReplayBuffer.state_dict() returns")
        if state["version"] not in _STATES_READ:
            raise ValueError(f"state: has version {state['version']!r}, expected at most {_STATE_VERSION}")
        for name, mine in (("capacity", self._capacity), ("policy", self._policy)):
            if state[name] != mine:
                raise ValueError(f"state: has {name} {state[name]!r}, expected {mine!r} as in this buffer")
        for name in _STATE_TENSORS:
            if not isinstance(state[name], Tensor):
                raise ValueError(f"state: {name} is a {type(state[name]).__name__}, expected a torch.Tensor")
        x, y = state["x"], state["y"]
        keys, classes, seen = state["keys"].cpu(), state["seen_classes"].cpu(), state["seen_counts"].cpu()
        held = len(keys)
        if len(x) != held or y.shape != (held,) or keys.dim() != 1 or keys.dtype != torch.float64:
            raise ValueError(
                f"state: x of shape {tuple(x.shape)}, y of shape {tuple(y.shape)} and keys of shape "
                f"{tuple(keys.shape)} ({keys.dtype}) do not belong together"
            )
        labels = y.to("cpu", torch.int64)
        order_kept = bool((classes[1:] > classes[:-1]).all())
        if classes.shape != seen.shape or not order_kept or not bool(torch.isin(labels, classes).all()):
            raise ValueError("state: seen_classes and seen_counts do not belong to the labels in y")
        counts = torch.bincount(torch.searchsorted(classes, labels), minlength=len(classes))
        quota = _quotas(self._policy, self._capacity, seen)
        # What is held is settled by the seen counts: per class, or in total for the reservoir.
        by_total = self._policy == "reservoir"
        if held != min(int(seen.sum()), self._capacity) if by_total else not torch.equal(counts, quota):
            raise ValueError(f"state: the {held} rows held do not fit the seen counts and the capacity")
        extras = state.get("extras", {})
        if not isinstance(extras, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) and value.shape[:1] == (held,)
            for name, value in extras.items()
        ):
            raise ValueError(f"state: extras is not a dict of tensors by name, each with the {held} rows held")
        if extras.keys() & {"x", "y"}:
            raise ValueError("state: extras holds x or y, expected other names")
        generators = torch.Generator(), torch.Generator()
        for generator, name in zip(generators, ("key_generator", "draw_generator"), strict=True):
            try:
                generator.set_state(state[name].cpu())
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"state: {name} is not the state of a torch.Generator on the CPU ({error})") from error
        self._columns = None
        if state["opened"]:
            self._columns = {
                name: torch.cat([column, rows.detach().to(column.device, column.dtype)])
                for (name, column), rows in zip(self._opened(x, extras).items(), (x, *extras.values(), y), strict=True)
            }
        self._keys, self._labels, self._slots = keys.clone(), labels.clone(), torch.arange(held)
        self._classes, self._seen = classes.clone(), seen.clone()
        self._key_generator, self._draw_generator = generators


_STATE_TENSORS = ("x", "y", "keys", "seen_classes", "seen_counts", "key_generator", "draw_generator")
_STATE_KEYS = frozenset({*_STATE_TENSORS, "version", "capacity", "policy", "opened"})


def _smallest_keys(
    keys: Tensor, labels: Tensor, policy: BufferPolicy, capacity: int, classes: Tensor, seen: Tensor
) -> Tensor:
    """Which rows stay: those with the smallest keys within the quota; ``(R,)`` bool.

    A quota never rises again once it is below the rows seen of its class, therefore rows turned away before can be left
    out of account: the result is that of deciding on everything seen at once.
    """
    keep = torch.zeros(len(keys), dtype=torch.bool)
    # Stable: of equal keys the earlier row wins, whatever the split into calls.
    order = torch.argsort(keys, stable=True)
    if policy == "reservoir":
        keep[order[:capacity]] = True
        return keep
    where = torch.searchsorted(classes, labels)
    order = order[torch.argsort(where[order], stable=True)]
    counts = torch.bincount(where, minlength=len(classes))
    starts = torch.cumsum(counts, 0) - counts
    class_of = where[order]
    rank = torch.arange(len(keys)) - starts[class_of]
    keep[order] = rank < _quotas(policy, capacity, seen)[class_of]
    return keep


def _quotas(policy: BufferPolicy, capacity: int, seen: Tensor) -> Tensor:
    """Rows that each class may keep ``(P,)``, from the rows seen of each ``(P,)``, classes in ascending order."""
    if policy == "class":
        return seen.clamp(max=capacity)
    if policy == "reservoir" or int(seen.sum()) <= capacity:
        return seen.clone()
    # Water-filling: the highest level L with sum(min(seen, L)) <= capacity. With the k smallest classes below the
    # level, the others share what is left; the first k that is consistent with its own level is the answer.
    ascending = torch.sort(seen).values
    below = torch.cumsum(ascending, 0) - ascending
    sharing = torch.arange(len(seen), 0, -1)
    levels = torch.div(capacity - below, sharing, rounding_mode="floor")
    level = levels[int((levels < ascending).nonzero()[0])]
    quota = seen.clamp(max=int(level))
    more = seen > level
    return quota + (more & (torch.cumsum(more, 0) <= capacity - quota.sum()))


def _extras_of(columns: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The first ``rows`` entries of the extra columns."""
    return {name: column[:rows] for name, column in columns.items() if name not in ("x", "y")}


def _enlarged(store: Tensor, rows: int) -> Tensor:
    larger = store.new_empty((rows, *store.shape[1:]))
    larger[: len(store)] = store
    return larger


def _derived_seed(seed: int, purpose: str) -> int:
    """A seed of the buffer's own: a caller's generator with the same seed must not yield the same numbers."""
    digest = hashlib.sha256(f"gradmix.ReplayBuffer {purpose} {int(seed)}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _check_int(name: str, value: int, minimum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an integer")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: got {value}, expected at least {minimum}")
