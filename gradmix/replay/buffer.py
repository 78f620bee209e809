"""The replay buffer: a small, fair sample of everything seen so far.

Every row seen is given an independent uniform key, and the rows with the smallest keys within a quota are held. The
k smallest of n independent keys sit at a uniformly random set of k rows, so what is held is a uniform sample without
replacement of what was seen, however the rows were split into calls. The policies differ only in the quota.

Rows lie in memory, or, where they exceed it, in files of a folder (:mod:`gradmix.replay.sample_files`); what is held
and drawn is the same.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradmix.graphs import sent
from gradmix.inputs import InputTree, check_inputs, leaves, map_tensors, take, tensors_of
from gradmix.replay.sample_files import Column, RowFiles

BufferPolicy = Literal["class", "balanced", "reservoir"]

_STATE_VERSION = 2
_STATES_READ = (1, 2)  # 1: without extra columns
_FOLDER_STATE_VERSION = 3  # the rows lie in a folder

_STATES_KEPT = 2
"""States whose rows in a folder are not overwritten: the one that was saved last, and the one being saved."""


class BufferRows(NamedTuple):
    """Rows drawn from a buffer, with all that is kept with them.

    Attributes:
        x: ``(n, ...)`` inputs: a tensor, or a dict, tuple or list of tensors, as they were given.
        y: ``(n,)`` int64 labels.
        extras: ``(n, ...)`` by the name given to :meth:`ReplayBuffer.add`; empty if nothing was given.
    """

    x: Any
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

    Inputs are a tensor, or a mapping, tuple or list of tensors with one number of rows, such as a tokenizer's ids and
    mask; a mapping comes back as a dict.

    Anything else known of a row can be kept with it, under a name of the caller's: extra columns, which follow their
    rows through every policy. DER++ keeps the logits that the model gave a row when it was added, and later trains it
    to give them again.

    With a ``folder`` the rows lie in its files and only the ledger in memory: some 40 bytes a row, and what is drawn.
    :meth:`state_dict` then holds the ledger and where the rows are, not the rows themselves, and goes with the folder.
    To be able to go on from a state after a crash at any moment, rows that left the buffer are not overwritten as long
    as one of the two states taken last has them: one of these is the last that was saved, if every state is saved
    before the next one is taken. So the files hold more rows than the buffer, by those that were replaced meanwhile.

    Args:
        capacity: Rows per class for policy ``class``, rows in total otherwise; at least 1.
        policy: One of the three above.
        device: Where the rows are kept; ``None``: where the first rows added lie. With a folder, where drawn rows go;
            ``None``: the CPU.
        seed: Seeds the keys and, apart from them, the draws of :meth:`sample` and :meth:`draw_balanced`.
        folder: A new or empty folder of the buffer's own for its rows, or the one it had before, if its state is loaded
            before any rows are added; ``None``: rows lie in memory. One buffer at a time may use a folder.

    Raises:
        TypeError: ``capacity`` or ``seed`` is not an integer, or ``folder`` no path.
        ValueError: ``capacity`` is below 1 or ``policy`` is unknown, or there is something else in the folder.

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
        folder: str | Path | None = None,
    ) -> None:
        _check_int("capacity", capacity, minimum=1)
        _check_int("seed", seed)
        if policy not in get_args(BufferPolicy):
            raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(map(repr, get_args(BufferPolicy)))}")
        self._capacity = int(capacity)
        self._policy: BufferPolicy = policy
        if folder is not None and not isinstance(folder, (str, Path)):
            raise TypeError(f"folder: got {type(folder).__name__}, expected a path or None")
        self._device = None if device is None else torch.device(device)
        self._files = None if folder is None else RowFiles(folder)
        # Two generators: how often the buffer is sampled must not change what it holds.
        self._key_generator = torch.Generator("cpu").manual_seed(_derived_seed(seed, "keys"))
        self._draw_generator = torch.Generator("cpu").manual_seed(_derived_seed(seed, "draws"))
        # The ledger lies on the CPU, in order of arrival, one entry per row held; the rows themselves lie in the
        # columns "x", "y" and the extra ones on the buffer's device, at `_slots`. Decisions never wait for the rows,
        # and nothing depends on the slots, nor on the columns' spare room: they need not be saved. With a folder the
        # columns have no rows and only say what they are like; "y" has no file, as the ledger has the labels. Inputs
        # of several parts have a column each, by the path of the part, and `_parts` is their tree with columns' names.
        self._keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self._labels = torch.empty(0, dtype=torch.int64, device="cpu")
        self._slots = torch.empty(0, dtype=torch.int64, device="cpu")
        self._columns: dict[str, Tensor] | None = None
        self._parts: Any = "x"
        self._classes = torch.empty(0, dtype=torch.int64, device="cpu")
        self._seen = torch.empty(0, dtype=torch.int64, device="cpu")
        # Only with a folder: of each row held, what tells that it is still there; slots that states refer to.
        self._stamps = torch.empty(0, dtype=torch.int64, device="cpu")
        self._kept_slots: deque[Tensor] = deque(maxlen=_STATES_KEPT)
        self._reader: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None

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
    def x(self) -> Any:
        """The inputs held, ``(len, ...)``, in order of arrival; of shape ``(0,)`` before the first :meth:`add`.

        A tensor, or a dict, tuple or list of tensors, as they were given.

        It shares memory with the buffer: read it before the next :meth:`add`, and do not write to it. With a folder it
        is mapped from the file, on the CPU, as long as no row was replaced; after that it is a copy of all rows, in
        memory: :meth:`part` gives some of them.
        """
        if self._files is not None and self._columns is not None:
            return map_tensors(self._from_files, self._parts)
        columns = self._compact()
        if columns is None:
            return torch.empty(0, device=self._device or "cpu")
        return take(self._inputs_of(columns), slice(len(self)))

    def _inputs_of(self, columns: Mapping[str, Tensor]) -> Any:
        """The tree of inputs among the columns."""
        return map_tensors(lambda name: columns[name], self._parts)

    def _extras_of(self, columns: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """The first ``rows`` entries of the extra columns."""
        inputs = {"y", *(name for _, name in leaves(self._parts))}
        return {name: column[:rows] for name, column in columns.items() if name not in inputs}

    @property
    def y(self) -> Tensor:
        """The labels held, ``(len,)`` int64, in the order of :attr:`x`; it shares memory with the buffer."""
        if self._files is not None:
            return self._labels.to(self._device or "cpu")
        columns = self._compact()
        if columns is None:
            return torch.empty(0, dtype=torch.int64, device=self._device or "cpu")
        return columns["y"][: len(self)]

    @property
    def extras(self) -> dict[str, Tensor]:
        """What is kept with the rows, ``(len, ...)`` by name, in the order of :attr:`x`; it shares memory as that does.

        Empty before the first :meth:`add`, and if that was given none.
        """
        if self._files is not None and self._columns is not None:
            return {name: self._from_files(name) for name in self._extras_of(self._columns, 0)}
        return self._extras_of(self._compact() or {}, len(self))

    def part(self, start: int, stop: int) -> tuple[Any, Tensor]:
        """Some of the rows held, in order of arrival: those that ``x[start:stop]`` and ``y[start:stop]`` are.

        With a folder they are read from it, on the buffer's device, and copies; else they share memory with the buffer.
        """
        if self._files is None or self._columns is None:
            return take(self.x, slice(start, stop)), self.y[start:stop]
        taken = self._take(torch.arange(len(self), device="cpu")[start:stop])
        return taken.x, taken.y

    def _from_files(self, name: str) -> Tensor:
        """A whole column, in order of arrival, on the CPU."""
        assert self._files is not None
        if torch.equal(self._slots, torch.arange(len(self), device="cpu")):
            return self._files.mapped(name, len(self))
        return self._files.read(self._slots, names=(name,))[name]

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

    def add(self, x: InputTree, y: Tensor, **extras: Tensor) -> None:
        """Shows rows to the buffer, which keeps copies of those within the quota.

        Which rows are kept is decided on their keys alone; only those are copied, so rows that are turned away cost
        next to nothing.

        Args:
            x: Inputs ``(N, ...)``, on any device; kept detached. A tensor, or a mapping, tuple or list of tensors,
                nested at will. The first call fixes the parts, and the shape and dtype of a row.
            y: Labels ``(N,)``, integers of at least 0, on any device.
            extras: Tensors ``(N, ...)`` kept with the rows, by name, on any device; kept detached. The first call fixes
                the names, and the shape and dtype of each one's rows.

        Raises:
            TypeError: An argument is not a tensor, or ``y`` does not hold integers, or a dtype is not that of the rows
                held.
            ValueError: The shapes do not fit each other or the rows held, a label is negative, or the names of
                ``extras`` are not those of the first call; or the folder is another buffer's.
            OSError: The rows cannot be written to the folder; the buffer holds what it held before.
        """
        labels, rows = self._check_rows(x, y, extras)
        # What is made here lasts: no tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._columns is None:
                self._columns = self._opened(rows)
                self._parts = _paths(x)
            if len(labels) == 0:
                return
            self._undo_prefetch()
            generator_state = self._key_generator.get_state()
            try:
                self._add(rows, labels)
            except OSError:
                self._key_generator.set_state(generator_state)
                raise

    def _add(self, rows: Mapping[str, Tensor], labels: Tensor) -> None:
        """:meth:`add` with checked arguments, by column, of at least one row."""
        assert self._columns is not None
        keys = torch.rand(len(labels), dtype=torch.float64, generator=self._key_generator, device="cpu")
        classes, seen = self._count(labels)
        held = len(self)
        all_keys, all_labels = torch.cat([self._keys, keys]), torch.cat([self._labels, labels])
        keep = _smallest_keys(all_keys, all_labels, self._policy, self._capacity, classes, seen)
        old, new = keep[:held], keep[held:].nonzero().squeeze(1)
        slots, stamps = self._slots[old], self._stamps
        if self._files is not None:
            slots, stamps = self._written(self._files, rows, new, slots, stamps[old])
        elif len(new) > 0:
            self._columns, slots_new = self._with_room(self._columns, slots, len(new))
            for name, given in {**rows, "y": labels}.items():
                column = self._columns[name]
                values = given.detach().index_select(0, new.to(given.device)).to(column.device)
                column.index_copy_(0, slots_new.to(column.device), values)
            slots = torch.cat([slots, slots_new])
        self._keys, self._labels, self._slots, self._stamps = all_keys[keep], all_labels[keep], slots, stamps
        self._classes, self._seen = classes, seen

    def _written(
        self, files: RowFiles, rows: Mapping[str, Tensor], new: Tensor, slots: Tensor, stamps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the ``new`` rows ``(k,)`` into the folder, and returns slots and stamps with theirs appended."""
        if len(new) == 0:
            return slots, stamps
        # Rows that are given up now too: should writing fail, they are still held.
        taken = torch.cat([self._slots, *self._kept_slots]).unique()
        files.reserve(len(taken) + len(new))
        free = torch.ones(files.room, dtype=torch.bool, device="cpu")
        free[taken] = False
        slots_new = free.nonzero().squeeze(1)[: len(new)]
        kept = {name: given.detach().index_select(0, new.to(given.device)).cpu() for name, given in rows.items()}
        return torch.cat([slots, slots_new]), torch.cat([stamps, files.write(slots_new, kept)])

    def _check_rows(self, x: InputTree, y: Tensor, extras: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Checks the arguments of :meth:`add`.

        Returns:
            The labels as int64 on the CPU, never the caller's own, and all else by the name of its column.
        """
        inputs = dict(leaves(x))
        for name, value in {**inputs, "y": y, **extras}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
        count = check_inputs("x", x)
        rows: dict[str, Tensor] = {**inputs, **extras}  # type: ignore[dict-item]
        if y.shape != (count,):
            hint = "; y.squeeze(1) has that shape" if y.shape == (count, 1) else ""
            raise ValueError(f"y: got shape {tuple(y.shape)}, expected ({count},), one label for every row of x{hint}")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"y: got dtype {y.dtype}, expected integer labels (int64)")
        for name, value in extras.items():
            if value.shape[:1] != (count,):
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected ({count}, ...), an entry for every row of x"
                )
        if self._columns is not None:
            known = [str(name) for _, name in leaves(self._parts)]
            if inputs.keys() != set(known):
                raise ValueError(f"x: got the parts {', '.join(inputs)}, expected {', '.join(known)} as before")
            self._check_alike(rows, self._columns, {"y", *known})
        labels = y.detach().to("cpu", torch.int64)
        if len(labels) > 0 and int(labels.min()) < 0:
            raise ValueError(
                f"y: got label {int(labels.min())}, expected labels of at least 0; rows without a class, y < 0, are to "
                "be left out"
            )
        return labels, rows

    @staticmethod
    def _check_alike(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], known: set[str]) -> None:
        """Refuses other names than those of the first rows, of all but ``known``, and other shapes or dtypes."""
        came, expected = rows.keys() - known, columns.keys() - known
        if came != expected:
            got, before = (", ".join(sorted(names)) or "none" for names in (came, expected))
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

    def _opened(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Columns without rows, of the first rows' device, names, row shapes and dtypes; room comes by need."""
        if self._files is not None:
            self._device = self._device or torch.device("cpu")
            self._files.create({name: Column.of(value) for name, value in rows.items()})
        if self._device is None:
            self._device = next(iter(rows.values())).device
        columns = {
            name: torch.empty((0, *value.shape[1:]), dtype=value.dtype, device=self._device)
            for name, value in rows.items()
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
        free = torch.ones(rows, dtype=torch.bool, device="cpu")
        free[used] = False
        return columns, free.nonzero().squeeze(1)[:count]

    def _compact(self) -> dict[str, Tensor] | None:
        """The columns, in order of arrival: brought into it when rows are read, so that adding need not move any."""
        in_order = torch.arange(len(self), device="cpu")
        if self._columns is not None and not torch.equal(self._slots, in_order):
            with torch.inference_mode(False):
                at = self._slots.to(self._columns["y"].device)
                self._columns = {name: column.index_select(0, at) for name, column in self._columns.items()}
                self._slots = in_order.clone()
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
        if generator is None:
            if self._pending is not None and self._pending.n == n:
                return self._fetched()
            self._undo_prefetch()
            generator = self._draw_generator
        return self._take(self._drawn(n, generator))

    def prefetch(self, n: int) -> None:
        """Begins to copy the rows that the next ``sample(n)`` or ``sample_rows(n)`` will return, in the background.

        They are drawn here and now; only the copying, and the reading of a folder's files, is left to a thread. Nothing
        else changes: if rows are added meanwhile, or another number or balanced rows are drawn by the buffer's own
        generator, the draw is taken back, and is made anew when it is asked for. A state taken meanwhile is that of
        before the draw. Draws by a generator of the caller's have nothing to do with it.

        Args:
            n: Rows to draw.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        if self._pending is not None and self._pending.n == n:
            return
        self._undo_prefetch()
        before = self._draw_generator.get_state()
        take = self._taking(self._drawn(n, self._draw_generator))
        rows: Future[BufferRows] = Future()
        if self._files is None and self._device is not None and self._device.type != "cpu":
            # A copy on a device is queued there and then, behind what the caller's own stream has to do.
            rows.set_result(take())
        else:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="gradmix replay buffer")
            rows = self._reader.submit(take)
        self._pending = _Pending(n, before, rows)

    def _fetched(self) -> BufferRows:
        """The rows that were drawn ahead."""
        pending = self._pending
        assert pending is not None
        try:
            rows = pending.rows.result()
        except BaseException:
            self._undo_prefetch()
            raise
        self._pending = None
        return self._handed_out(rows)

    def _undo_prefetch(self) -> None:
        """Takes back a draw that was made ahead; nothing is read any more when this returns."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._draw_generator.set_state(pending.before)
            if not pending.rows.cancel():
                pending.rows.exception()

    def _drawn(self, n: int, generator: torch.Generator) -> Tensor:
        """Places of ``n`` rows drawn uniformly, ``(n,)`` on the CPU."""
        held = len(self)
        if n <= held:
            return torch.randperm(held, generator=generator, device=generator.device)[:n].cpu()
        return torch.randint(held, (n,), generator=generator, device=generator.device).cpu()

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
        if generator is None:
            self._undo_prefetch()
            generator = self._draw_generator
        device = generator.device
        if n == 0:
            return self._take(torch.empty(0, dtype=torch.int64, device="cpu"))[:2]
        classes, counts = torch.unique(self._labels, return_counts=True)
        # A random order within every class: sorted by label, shuffled beforehand.
        shuffled = torch.randperm(len(self), generator=generator, device=device).cpu()
        by_class = shuffled[torch.argsort(self._labels[shuffled], stable=True)]
        starts = torch.cumsum(counts, 0) - counts
        # Draw number d goes to class d mod P of a random order of classes, as that class's draw number d div P.
        draws = torch.arange(n, device="cpu")
        which = torch.randperm(len(classes), generator=generator, device=device).cpu()[draws % len(classes)]
        rows = by_class[starts[which] + (draws // len(classes)) % counts[which]]
        return self._take(rows[torch.randperm(n, generator=generator, device=device).cpu()])[:2]

    def _check_draw(self, n: int) -> None:
        _check_int("n", n, minimum=0)
        if n > 0 and len(self) == 0:
            raise ValueError(f"n: got {n}, but the buffer is empty; add rows before drawing any")

    def _take(self, rows: Tensor) -> BufferRows:
        """Copies of the rows at places ``rows (n,)`` of the ledger."""
        return self._handed_out(self._taking(rows.cpu())())

    def _taking(self, rows: Tensor) -> Callable[[], BufferRows]:
        """What copies the rows at places ``rows (n,)``, as they are now; it may be called in another thread."""
        columns, files, slots = self._columns, self._files, self._slots[rows]
        if columns is None:
            empty = BufferRows(self.x, self.y, {})
            return lambda: empty
        if files is not None:
            labels, pin = self._labels[rows], self._device is not None and self._device.type == "cuda"

            def read() -> BufferRows:
                taken = files.read(slots, pin=pin)
                return BufferRows(self._inputs_of(taken), labels, self._extras_of(taken, len(rows)))

            return read
        at = sent(slots, columns["y"].device)

        def copy() -> BufferRows:
            taken = {name: column.index_select(0, at) for name, column in columns.items()}
            return BufferRows(self._inputs_of(taken), taken["y"], self._extras_of(taken, len(rows)))

        return copy

    def _handed_out(self, rows: BufferRows) -> BufferRows:
        """The rows on the buffer's device; those of a folder were read into memory."""
        if self._files is None or self._device is None or self._device.type == "cpu":
            return rows
        device = self._device
        return BufferRows(
            map_tensors(lambda value: sent(value, device), rows.x),
            sent(rows.y, device),
            {name: sent(value, device) for name, value in rows.extras.items()},
        )

    # ------------------------------------------------------------------------------------------ moving and keeping it

    def to(self, device: torch.device | str) -> ReplayBuffer:
        """Moves the rows to ``device`` and returns the buffer itself; what it holds and will hold stays the same.

        Rows in a folder stay there, and those drawn from it go to ``device``.
        """
        self._undo_prefetch()
        self._device = torch.device(device)
        if self._columns is not None:
            with torch.inference_mode(False):
                self._columns = {name: column.to(self._device) for name, column in self._columns.items()}
        return self

    def close(self) -> None:
        """Ends the thread that :meth:`prefetch` may have begun, and gives the folder free, if there is one.

        Rows in a folder cannot be read any more then, unless a state of them is loaded. Rows in memory stay.
        """
        self._undo_prefetch()
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        if self._files is not None:
            self._files.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on identically: rows with their extras, keys, seen counts, both generators' states.

        The values are tensors, integers, strings, and dicts, tuples and lists of such, so that
        ``torch.load(..., weights_only=True)`` reads them.
        Tensors are copies.

        Of rows in a folder the state has the places instead. Everything has reached the disk when this returns, and the
        rows of this state and of the one taken before are not overwritten until another one is taken: save a state
        before you take the next one, and after a crash the last one saved can be loaded.
        """
        pending = self._pending
        state = {
            "version": _STATE_VERSION,
            "capacity": self._capacity,
            "policy": str(self._policy),
            "opened": int(self._columns is not None),
            "keys": self._keys.clone(),
            "seen_classes": self._classes.clone(),
            "seen_counts": self._seen.clone(),
            "key_generator": self._key_generator.get_state(),
            "draw_generator": self._draw_generator.get_state() if pending is None else pending.before.clone(),
        }
        if self._files is None:
            extras = {name: value.clone() for name, value in self.extras.items()}
            return state | {"x": map_tensors(Tensor.clone, self.x), "y": self.y.clone(), "extras": extras}
        self._files.flush()
        self._kept_slots.append(self._slots.clone())
        columns = {} if self._columns is None else self._files.columns
        return state | {
            "version": _FOLDER_STATE_VERSION,
            "y": self._labels.clone(),
            "files": {
                "identity": self._files.identity,
                "columns": {name: column.plain() for name, column in columns.items()},
                "parts": self._parts,
                "slots": self._slots.clone(),
                "stamps": self._stamps.clone(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state made by :meth:`state_dict`; rows go to this buffer's device, or stay where they lie.

        Args:
            state: As :meth:`state_dict` gives it, of a buffer with the same capacity and policy. It is not kept. One of
                version 1 has no extras. One of a buffer with a folder goes with that folder, which must not have been
                written to since by anybody but this buffer's own earlier process.

        Raises:
            ValueError: An entry is missing or does not fit this buffer or the other entries, or the rows that it speaks
                of are not in the folder; the buffer is unchanged.
            OSError: The folder cannot be read.
        """
        in_folder = "files" in state
        missing = sorted((_STATE_KEYS - {"x"} if in_folder else _STATE_KEYS) - set(state))
        if missing:
            raise ValueError(f"state: lacks {', '.join(missing)}; expected what ReplayBuffer.state_dict() returns")
        if in_folder != (self._files is not None):
            came, expected = ("in a folder", "folder= to name it") if in_folder else ("in the state", "folder=None")
            raise ValueError(f"state: has its rows {came}, expected a buffer made with {expected}")
        if state["version"] not in ((_FOLDER_STATE_VERSION,) if in_folder else _STATES_READ):
            raise ValueError(f"state: has version {state['version']!r}, expected at most {_STATE_VERSION}")
        for name, mine in (("capacity", self._capacity), ("policy", self._policy)):
            if state[name] != mine:
                raise ValueError(f"state: has {name} {state[name]!r}, expected {mine!r} as in this buffer")
        for name in _STATE_TENSORS:
            if not isinstance(state[name], Tensor):
                raise ValueError(f"state: {name} is a {type(state[name]).__name__}, expected a torch.Tensor")
        y = state["y"]
        x = y if in_folder else state["x"]
        for name, value in leaves(x):
            if not isinstance(value, Tensor) or value.dim() < 1:
                raise ValueError(f"state: {name} is a {type(value).__name__}, expected a torch.Tensor (N, ...)")
        keys, classes, seen = state["keys"].cpu(), state["seen_classes"].cpu(), state["seen_counts"].cpu()
        held = len(keys)
        inputs = {} if in_folder else dict(zip((name for name, _ in leaves(x)), tensors_of(x), strict=True))
        lengths = {len(value) for value in inputs.values()} - {held}
        if lengths or y.shape != (held,) or keys.dim() != 1 or keys.dtype != torch.float64:
            shapes = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in inputs.items())
            raise ValueError(
                f"state: {shapes or 'x in files'}, y of shape {tuple(y.shape)} and keys of shape {tuple(keys.shape)} "
                f"({keys.dtype}) do not belong together"
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
        generators = torch.Generator("cpu"), torch.Generator("cpu")
        for generator, name in zip(generators, ("key_generator", "draw_generator"), strict=True):
            try:
                generator.set_state(state[name].cpu())
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"state: {name} is not the state of a torch.Generator on the CPU ({error})") from error
        self._undo_prefetch()
        with torch.inference_mode(False):
            if self._files is not None:
                self._adopt(self._files, state["files"], held)
            else:
                self._slots, self._columns = torch.arange(held, device="cpu"), None
                if state["opened"]:
                    opened, self._parts = self._opened({**inputs, **extras}), _paths(x)
                    given = (*inputs.values(), *extras.values(), y)
                    self._columns = {
                        name: torch.cat([column, rows.detach().to(column.device, column.dtype)])
                        for (name, column), rows in zip(opened.items(), given, strict=True)
                    }
            self._keys, self._labels = keys.clone(), labels.clone()
            self._classes, self._seen = classes.clone(), seen.clone()
        self._key_generator, self._draw_generator = generators

    def _adopt(self, files: RowFiles, told: Mapping[str, Any], held: int) -> None:
        """Takes up the rows of a state in the folder, or raises and changes nothing."""
        try:
            slots, stamps = (told[name].to("cpu", torch.int64) for name in ("slots", "stamps"))
            columns = {str(name): Column.from_plain(column) for name, column in told["columns"].items()}
            identity, parts = str(told["identity"]), told.get("parts", "x")
            if columns and not {name for _, name in leaves(parts)} <= columns.keys():
                raise KeyError("parts")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state: files does not say where the rows are ({error})") from error
        if slots.shape != (held,) or stamps.shape != (held,) or len(slots.unique()) < held or bool((slots < 0).any()):
            raise ValueError(f"state: files does not have a slot for each of the {held} rows held")
        files.adopt(identity, columns, slots, stamps)
        self._slots, self._stamps = slots.clone(), stamps.clone()
        self._kept_slots.clear()
        self._kept_slots.append(self._slots.clone())
        self._columns, self._parts = None, parts
        if columns:
            self._device = self._device or torch.device("cpu")
            self._columns = {
                name: torch.empty((0, *c.shape), dtype=c.dtype, device="cpu") for name, c in columns.items()
            }
            self._columns["y"] = torch.empty(0, dtype=torch.int64, device="cpu")


class _Pending(NamedTuple):
    """Rows drawn ahead.

    Attributes:
        n: how many.
        before: the generator's state before they were drawn.
        rows: the rows, when they are there.
    """

    n: int
    before: Tensor
    rows: Future[BufferRows]


_STATE_TENSORS = ("y", "keys", "seen_classes", "seen_counts", "key_generator", "draw_generator")
_STATE_KEYS = frozenset({*_STATE_TENSORS, "x", "version", "capacity", "policy", "opened"})


def _smallest_keys(
    keys: Tensor, labels: Tensor, policy: BufferPolicy, capacity: int, classes: Tensor, seen: Tensor
) -> Tensor:
    """Which rows stay: those with the smallest keys within the quota; ``(R,)`` bool.

    A quota never rises again once it is below the rows seen of its class, therefore rows turned away before can be left
    out of account: the result is that of deciding on everything seen at once.
    """
    keep = torch.zeros(len(keys), dtype=torch.bool, device="cpu")
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
    rank = torch.arange(len(keys), device="cpu") - starts[class_of]
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
    sharing = torch.arange(len(seen), 0, -1, device="cpu")
    levels = torch.div(capacity - below, sharing, rounding_mode="floor")
    level = levels[int((levels < ascending).nonzero()[0])]
    quota = seen.clamp(max=int(level))
    more = seen > level
    return quota + (more & (torch.cumsum(more, 0) <= capacity - quota.sum()))


def _paths(x: Any, path: str = "x") -> Any:
    """The tree of inputs with the path of each leaf in its place, of plain dicts, tuples and lists."""
    if isinstance(x, Mapping):
        return {key: _paths(value, f"{path}[{key!r}]") for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [_paths(value, f"{path}[{index}]") for index, value in enumerate(x)]
        return tuple(parts) if isinstance(x, tuple) else parts
    return path


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
