"""The replay buffer: a small, uniformly random subset of all samples seen so far.

:class:`ReplayBuffer` composes the parts of this package. The ledger decides which samples are held, a store keeps their
data in memory or in files, draws choose among them, and a thread may copy the next draw ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from gradmix._moved import alias_attribute, moved
from gradmix.model.inputs import InputTree, map_tensors
from gradmix.replay import draws
from gradmix.replay.file_store import FileStore
from gradmix.replay.layout import LABELS, Layout, check_samples, no_samples
from gradmix.replay.ledger import BufferPolicy, Ledger
from gradmix.replay.memory_store import MemoryStore
from gradmix.replay.prefetch import Prefetch
from gradmix.replay.state import read_state, write_state
from gradmix.replay.store import Columns, Store
from gradmix.runtime.validation import check_choice


class BufferSamples(NamedTuple):
    """Samples drawn from a buffer, with their extras.

    Attributes:
        x: ``(n, ...)`` inputs: a tensor, or a dict, tuple or list of tensors, as they were given.
        y: ``(n,)`` int64 labels.
        extras: ``(n, ...)`` by the name given to :meth:`ReplayBuffer.add`; empty if none were given.
    """

    x: Any
    y: Tensor
    extras: dict[str, Tensor]


class ReplayBuffer:
    """A replay buffer that holds a uniformly random subset of the samples seen, within a quota set by its policy.

    Policies:

    - ``class``: ``capacity`` samples of every class; the buffer grows with the number of classes.
    - ``balanced``: ``capacity`` samples in total, shared equally by the classes seen. A class with fewer samples than
      its share leaves the rest to the others, so that the buffer is full as soon as ``capacity`` samples were seen. A
      remainder is given, one sample each, to the classes with the smallest labels.
    - ``reservoir``: ``capacity`` samples in total, a uniformly random subset of the stream whatever the classes.

    The samples held depend on the seed and on the sequence of samples alone: not on their split into calls of
    :meth:`add`, on the device, or on the number of draws. No global random state is read or changed.

    Inputs are a tensor, or a mapping, tuple or list of tensors with one number of samples, such as a tokenizer's ids
    and mask; a mapping is returned as a dict.

    Further tensors can be kept with a sample, under names of the caller's: extras, which stay with their samples under
    every policy. DER++ keeps the logits that the model gave a sample when it was added, and later trains the model to
    reproduce them.

    With a ``folder`` the inputs and extras lie in its files; in memory are only the ledger, about 40 bytes for each
    sample, and the samples drawn. :meth:`state_dict` then contains the ledger and the places of the samples, not the
    samples themselves, and belongs to the folder. Either of the two states taken last can be loaded after a crash at
    any moment: samples that left the buffer are not overwritten as long as one of these states contains them. If every
    state is saved before the next one is taken, one of the two is the last one saved. The files therefore hold more
    samples than the buffer: those replaced since then.

    Args:
        capacity: Samples per class for policy ``class``, samples in total otherwise; at least 1.
        policy: One of the three above.
        device: Device of the samples; ``None``: that of the first samples. With a folder, device of drawn samples;
            ``None``: the CPU.
        seed: Seed of the keys and, independently, of the draws of :meth:`sample` and :meth:`draw_balanced`.
        folder: A new or empty folder of the buffer's own, or the one it had before, if its state is loaded before any
            samples are added; ``None``: samples lie in memory. One buffer at a time may use a folder.

    Raises:
        TypeError: ``capacity`` or ``seed`` is not an integer, or ``folder`` no path.
        ValueError: ``capacity`` is below 1, ``policy`` is unknown, or the folder contains other files.

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
        >>> samples = buffer.sample_with_extras(3)
        >>> samples.x.shape, samples.extras["logits"].shape
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
        check_choice("policy", policy, get_args(BufferPolicy))
        if folder is not None and not isinstance(folder, (str, Path)):
            raise TypeError(f"folder: got {type(folder).__name__}, expected a path or None")
        where = None if device is None else torch.device(device)
        self._ledger = Ledger.empty(policy, int(capacity))
        self._store: Store = (
            MemoryStore(where, None if policy == "class" else int(capacity))
            if folder is None
            else FileStore(folder, where)
        )
        # Two generators: how often the buffer is sampled must not change what it holds.
        self._key_generator = torch.Generator("cpu").manual_seed(_derive_seed(seed, "keys"))
        self._draw_generator = torch.Generator("cpu").manual_seed(_derive_seed(seed, "draws"))
        self._prefetch = Prefetch(self._draw_generator)

    # ---------------------------------------------------------------------------------------------- samples held

    @property
    def capacity(self) -> int:
        """Samples per class for policy ``class``, samples in total otherwise."""
        return self._ledger.capacity

    @property
    def policy(self) -> BufferPolicy:
        """The policy that sets the quota."""
        return self._ledger.policy

    @property
    def device(self) -> torch.device | None:
        """Device of the samples; ``None`` before the first samples, unless one was given."""
        return self._store.device

    @property
    def x(self) -> Any:
        """The inputs held, ``(len, ...)``, in order of arrival; of shape ``(0,)`` before the first :meth:`add`.

        A tensor, or a dict, tuple or list of tensors, as they were given.

        It shares memory with the buffer: read it before the next :meth:`add`, and do not write to it. With a folder it
        is mapped from the file, on the CPU, as long as no sample was replaced; after that it is a copy of all samples,
        in memory: :meth:`part` gives some of them.
        """
        if self._store.layout is None:
            return no_samples(self.device)[0]
        return map_tensors(self._store.column, self._store.layout.parts)

    @property
    def y(self) -> Tensor:
        """The labels held, ``(len,)`` int64, in the order of :attr:`x`; it shares memory with the buffer."""
        return no_samples(self.device)[1] if self._store.layout is None else self._store.column(LABELS)

    @property
    def extras(self) -> dict[str, Tensor]:
        """The extras held, ``(len, ...)`` by name, in the order of :attr:`x`; the same holds for their memory.

        Empty before the first :meth:`add`, and if that was given none.
        """
        if self._store.layout is None:
            return {}
        return {name: self._store.column(name) for name in self._store.layout.extra_names}

    def part(self, start: int, stop: int) -> tuple[Any, Tensor]:
        """Return some of the samples held, in order of arrival: ``x[start:stop]`` and ``y[start:stop]``.

        With a folder they are read from it, on the buffer's device, and copies; else they share memory with the buffer.
        """
        if self._store.layout is None:
            x, y = no_samples(self.device)
            return x[start:stop], y[start:stop]
        columns = self._store.part(start, stop)
        return self._store.layout.inputs(columns), columns[LABELS]

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def seen(self) -> int:
        """Samples seen so far, held or not."""
        return self._ledger.total_seen

    @property
    def seen_per_class(self) -> dict[int, int]:
        """Samples seen so far of every class, by label."""
        return self._ledger.count_seen()

    @property
    def classes(self) -> tuple[int, ...]:
        """Labels of which at least one sample is held, in ascending order."""
        return tuple(self._ledger.class_counts())

    def class_counts(self) -> dict[int, int]:
        """Return the samples held of every class of which there is at least one, by label."""
        return self._ledger.class_counts()

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer(capacity={self.capacity}, policy={self.policy!r}, held={len(self)}, seen={self.seen}, "
            f"classes={len(self._ledger.classes)}, device={self.device})"
        )

    # -------------------------------------------------------------------------------------------------- filling it

    def add(self, x: InputTree, y: Tensor, **extras: Tensor) -> None:
        """Add samples to the stream; the buffer keeps copies of those within the quota.

        The keys alone decide which samples are kept; only these are copied, so that rejected samples cost almost
        nothing.

        Args:
            x: Inputs ``(N, ...)``, on any device; kept detached. A tensor, or a mapping, tuple or list of tensors,
                nested at will. The first call fixes the parts, and the shape and dtype of a sample.
            y: Labels ``(N,)``, integers of at least 0, on any device.
            extras: Tensors ``(N, ...)`` kept with the samples, by name, on any device; kept detached. The first call
                fixes the names, and the shape and dtype of each.

        Raises:
            TypeError: An argument is not a tensor, or ``y`` does not hold integers, or a dtype is not that of the
                samples held.
            ValueError: The shapes do not fit each other or the samples held, a label is negative, or the names of
                ``extras`` are not those of the first call; or the folder is another buffer's.
            OSError: The samples cannot be written to the folder; the buffer holds what it held before.
        """
        labels, columns = check_samples(x, y, extras, self._store.layout)
        # What is made here lasts: no tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if self._store.layout is None:
                self._store.open(Layout.of(x, columns), next(iter(columns.values())).device)
            if len(labels) == 0:
                return
            self._prefetch.undo()
            generator_state = self._key_generator.get_state()
            keys = torch.rand(len(labels), dtype=torch.float64, generator=self._key_generator, device="cpu")
            admission = self._ledger.admit(keys, labels)
            try:
                self._store.update(admission.kept, admission.new, columns, admission.ledger.labels)
            except OSError:
                self._key_generator.set_state(generator_state)
                raise
            self._ledger = admission.ledger

    # ---------------------------------------------------------------------------------------------- drawing from it

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples uniformly: without replacement while there are enough, with replacement when ``n > len(self)``.

        Args:
            n: Samples to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)`` and ``y (n,)`` int64, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        samples = self.sample_with_extras(n, generator)
        return samples.x, samples.y

    def sample_with_extras(self, n: int, generator: torch.Generator | None = None) -> BufferSamples:
        """Make the same draw as :meth:`sample`, and return the extras too.

        Args:
            n: Samples to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)``, ``y (n,)`` int64 and ``extras`` by name ``(n, ...)``, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        if generator is None and self._prefetch.has(n):
            return self._as_samples(self._prefetch.take())
        return self._read(draws.draw_uniform(len(self), n, self._generator(generator)))

    sample_rows = alias_attribute("ReplayBuffer", "sample_rows", "sample_with_extras")

    def prefetch(self, n: int) -> None:
        """Begin to copy the samples of the next ``sample(n)`` or ``sample_with_extras(n)``, in the background.

        They are drawn at once; only copying, and reading a folder's files, is done in a thread. Results do not change:
        if samples are added meanwhile, or the buffer's own generator draws another number of samples or balanced ones,
        the draw is undone, and repeated when it is requested. A state taken meanwhile is that before the draw. Draws by
        a generator of the caller's do not interfere.

        Args:
            n: Samples to draw.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        if self._store.layout is None or self._prefetch.has(n):
            return

        def draw() -> Callable[[], Columns]:
            return self._store.reader(draws.draw_uniform(len(self), n, self._draw_generator))

        self._prefetch.start(n, draw, in_thread=not self._store.copies_on_device)

    def draw_balanced(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples class-balanced: every class held gets ``n // P`` or one more of the ``n``, in random order.

        Which of the ``P`` classes get one more is random. Within a class samples are drawn without replacement; where a
        class has too few, each of its samples is drawn equally often, up to one.

        Args:
            n: Samples to draw.
            generator: Source of randomness, on any device; ``None``: the buffer's own.

        Returns:
            Copies ``x (n, ...)`` and ``y (n,)`` int64, on the buffer's device.

        Raises:
            TypeError: ``n`` is not an integer.
            ValueError: ``n`` is negative, or the buffer is empty and ``n`` is not 0.
        """
        self._check_draw(n)
        return self._read(draws.draw_balanced(self._ledger.labels, n, self._generator(generator)))[:2]

    def _check_draw(self, n: int) -> None:
        """Raise unless ``n`` samples can be drawn."""
        _check_int("n", n, minimum=0)
        if n > 0 and len(self) == 0:
            raise ValueError(f"n: got {n}, but the buffer is empty; add samples before drawing any")

    def _generator(self, given: torch.Generator | None) -> torch.Generator:
        """Return the generator of a draw; for the buffer's own, undo a draw made ahead."""
        if given is not None:
            return given
        self._prefetch.undo()
        return self._draw_generator

    def _read(self, places: Tensor) -> BufferSamples:
        """Return copies of the samples at places (n,)."""
        if self._store.layout is None:
            return BufferSamples(*no_samples(self.device), {})
        return self._as_samples(self._store.reader(places)())

    def _as_samples(self, columns: Columns) -> BufferSamples:
        """Return the columns copied by the store's reader as samples on the buffer's device."""
        layout = self._store.layout
        assert layout is not None
        columns = self._store.deliver(columns)
        return BufferSamples(layout.inputs(columns), columns[LABELS], layout.extras(columns))

    # ------------------------------------------------------------------------------------------ moving and keeping it

    def to(self, device: torch.device | str) -> ReplayBuffer:
        """Move the samples to ``device`` and return the buffer itself; the present and future samples stay the same.

        Samples in a folder stay there; samples drawn from it are copied to ``device``.
        """
        self._prefetch.undo()
        self._store.to(torch.device(device))
        return self

    def close(self) -> None:
        """End the thread that :meth:`prefetch` may have begun, and release the folder, if there is one.

        Samples in a folder cannot be read any more then, unless a state of them is loaded. Samples in memory stay.
        """
        self._prefetch.close()
        self._store.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue identically: samples, keys, seen counts, both generators' states.

        The values are tensors, integers, strings, and dicts, tuples and lists of such, so that
        ``torch.load(..., weights_only=True)`` reads them.
        Tensors are copies.

        For samples in a folder the state contains their places instead. When this returns, all samples are on the disk.
        The samples of this state and of the previous one are not overwritten until another one is taken: if every state
        is saved before the next one is taken, the last one saved can be loaded after a crash.
        """
        state = write_state(
            self._ledger,
            opened=self._store.layout is not None,
            key_generator=self._key_generator.get_state(),
            draw_generator=self._prefetch.generator_state(),
        )
        return state | self._store.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict`; samples go to this buffer's device, or stay where they lie.

        Args:
            state: As :meth:`state_dict` returns it, of a buffer with the same capacity and policy. It is not kept. A
                state of version 1 has no extras. A state of a buffer with a folder belongs to that folder; since then
                only this buffer's own earlier process may have written to it.

        Raises:
            ValueError: An entry is missing or does not fit this buffer or the other entries, or the samples that it
                refers to are not in the folder; the buffer is unchanged.
            OSError: The folder cannot be read.
        """
        loaded = read_state(state, self._ledger, in_folder=self._store.in_folder)
        self._prefetch.undo()
        with torch.inference_mode(False):
            self._store.load(loaded)
        self._ledger = loaded.ledger
        self._key_generator.set_state(loaded.key_generator)
        self._draw_generator.set_state(loaded.draw_generator)


def _derive_seed(seed: int, purpose: str) -> int:
    """Return a seed of the buffer's own, so that a caller's generator with the same seed draws other numbers."""
    digest = hashlib.sha256(f"gradmix.ReplayBuffer {purpose} {int(seed)}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _check_int(name: str, value: int, minimum: int | None = None) -> None:
    """Raise unless ``value`` is an integer, and not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an integer")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: got {value}, expected at least {minimum}")


__getattr__ = moved(__name__, __name__, {"BufferRows": "BufferSamples"})
