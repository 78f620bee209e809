"""Sketched gradients summed by class, which merge by addition: over batches, over processes, over time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.gradients.layout import LayerSketch, layer_vectors
from gradmix.gradients.similarity import Aligned, align, cosines, differences, reference_vector

_FORMAT = "gradmix.ClassGradients"
_VERSIONS = {True: "1", False: "2"}
"""Version of a file with norms, and of one without, which readers of version 1 do not know."""
_TENSORS = ("classes", "vectors", "counts", "square_norms")


@dataclass(eq=False)
class ClassGradients:
    """The sketched gradients of the samples of P classes, summed by class.

    Attributes:
        classes: (P,) int64, ascending: the classes that occur.
        vectors: (P, D) float32, or float64 for a float64 model: sums of the samples' sketched gradients, one layer
            after the other.
        counts: (P,) int64: number of samples summed.
        square_norms: (P, L) of the same dtype: for each of L layers, the sum of the squared norms of the samples'
            sketches, an unbiased estimate of the sum of the squared gradient norms. The variance within a class is
            ``square_norms / counts - |mean|^2``. None with ``norms=False``.
        layout: the place of each layer among the D entries, and its parameters.
        sketch: kind, seed and rank of the sketch, as plain values.
        ways: how the sums were computed: ``"layer rules"``, ``"pass per class"``, ``"per sample"``, or several of these
            for different layers or chunks. Empty in what was read from a state or a file.
    """

    classes: Tensor
    vectors: Tensor
    counts: Tensor
    square_norms: Tensor | None
    layout: tuple[LayerSketch, ...]
    sketch: Mapping[str, object]
    ways: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return _TENSORS[:3] if self.square_norms is None else _TENSORS

    def _map(self, function: Callable[[Tensor], Tensor]) -> ClassGradients:
        """Return a copy with ``function`` applied to every tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in self._names}
        return replace(self, **changed)

    def layer(self, name: str) -> Tensor:
        """Return the sums of one layer, by its name, (P, rows, columns).

        Raises:
            KeyError: there is no such layer.
        """
        return layer_vectors(self.vectors, self.layout, name)

    def mean(self) -> Tensor:
        """Return the mean gradient of each class, (P, D)."""
        return self.vectors / self.counts.to(self.vectors.dtype)[:, None]

    def overall_mean(self) -> Tensor:
        """Return the mean over all samples, (D,); for the samples of the replay buffer it is the reference gradient."""
        return self.vectors.sum(0) / self.counts.sum()

    def cosine(self) -> Tensor:
        """Return the cosines between the classes' mean gradients, (P, P); 0 where a gradient is 0."""
        return cosines(self.vectors, self.vectors)

    def align(self, reference: object) -> Aligned:
        """Return inner products and cosines of the classes' mean gradients with a reference, both (P,).

        Args:
            reference: :class:`ClassGradients` or :class:`SampleGradients` of the same sketch, such as the buffer's,
                whose mean over all samples counts; or a vector (D,).

        Raises:
            TypeError, ValueError: the reference is of another sketch, model or type.
        """
        return align(self.mean(), reference_vector(self, reference))

    def select(self, classes: Tensor) -> ClassGradients:
        """Return the gradients of these classes only, in ascending order; classes that do not occur are left out."""
        kept = torch.isin(self.classes, classes.to(self.classes))
        return self._map(lambda tensor: tensor[kept])

    def to(self, device: torch.device | str) -> ClassGradients:
        """Return the gradients on another device."""
        return self._map(lambda tensor: tensor.to(device))

    # ------------------------------------------------------------------------------------------------------- merging

    def __add__(self, other: ClassGradients) -> ClassGradients:
        """Return the gradients of the samples of both.

        Raises:
            ValueError: the sketches or the layers differ, or only one has norms.
        """
        if not isinstance(other, ClassGradients):
            return NotImplemented
        return self._with_classes(other.classes)._accumulate(other)

    def add_(self, other: ClassGradients) -> ClassGradients:
        """Add ``other`` in place, without a copy where no class is new; returns self.

        Raises:
            ValueError: the sketches or the layers differ, or only one has norms; the object is then unchanged.
        """
        self._check(other)
        if not bool(torch.isin(other.classes, self.classes).all()):
            extended = self._with_classes(other.classes)
            for name in self._names:
                setattr(self, name, getattr(extended, name))
        return self._accumulate(other)

    def _check(self, other: ClassGradients) -> None:
        why = differences(self, other)
        if why:
            raise ValueError(f"class gradients to add: got {why}")
        if len(self._names) != len(other._names):
            mine, its = ("without" if g.square_norms is None else "with" for g in (self, other))
            raise ValueError(
                f"class gradients to add: got some {its} square_norms, expected them {mine}, as the others; compute "
                "both with the same norms=, or set square_norms = None where there are some"
            )

    def _with_classes(self, classes: Tensor) -> ClassGradients:
        """Return a copy that has entries for these classes too."""
        union = torch.cat([self.classes, classes.to(self.classes)]).unique()
        index = torch.searchsorted(union, self.classes)

        def extend(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros(len(union), *tensor.shape[1:])
            new[index] = tensor
            return new

        return replace(self._map(extend), classes=union)

    def _accumulate(self, other: ClassGradients) -> ClassGradients:
        self._check(other)
        index = torch.searchsorted(self.classes, other.classes.to(self.classes))
        for name in self._names[1:]:
            mine = getattr(self, name)
            mine.index_add_(0, index, getattr(other, name).to(mine))
        self.ways |= other.ways
        return self

    def all_reduce(self, group: Any = None) -> ClassGradients:
        """Return the gradients of the samples of all processes of a group, the same in each; self without a group.

        Every process must call it; a process without samples calls it on :meth:`empty`.

        Args:
            group: a process group of ``torch.distributed``; None: the default one.

        Returns:
            New :class:`ClassGradients`, on this one's device.

        Raises:
            ValueError: the processes' sketches or layers differ, or only some have norms; raised in all of them.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        size = distributed.get_world_size(group)
        gathered: list[Any] = [None] * size
        alike = (self.layout, dict(self.sketch), str(self.vectors.dtype), self.square_norms is not None)
        distributed.all_gather_object(gathered, (self.classes.tolist(), self.ways, alike), group=group)
        known = [entry for entry in gathered if entry[2][0]]
        if not known:
            return self
        for entry in known[1:]:
            if entry[2] != known[0][2]:
                raise ValueError(
                    "class gradients to reduce: got other layers, sketches or dtypes in different processes, or some "
                    f"without square_norms, expected the same; here {dict(self.sketch)}"
                )
        layout, sketch, dtype_name, norms = known[0][2]
        dtype = getattr(torch, dtype_name.removeprefix("torch."))
        like = {"dtype": dtype, "device": self.vectors.device}
        classes = torch.tensor(sorted({c for entry in known for c in entry[0]}), device=self.classes.device)
        count = len(classes)
        start = ClassGradients(
            classes,
            torch.zeros(count, layout[-1].stop, **like),
            torch.zeros(count, dtype=torch.int64, device=self.counts.device),
            torch.zeros(count, len(layout), **like) if norms else None,
            layout,
            sketch,
            frozenset().union(*(entry[1] for entry in known)),
        )
        if self.layout:
            start._accumulate(self)
        for name in start._names[1:]:
            distributed.all_reduce(getattr(start, name), group=group)
        return start

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> ClassGradients:
        """Return the gradients of no samples, on which a process without data calls :meth:`all_reduce`."""
        return cls(
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, 0, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, 0, device=device),
            (),
            {},
        )

    # -------------------------------------------------------------------------------------------------------- keeping

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; loads with ``torch.load(weights_only=True)``."""
        return {
            **{name: getattr(self, name) for name in _TENSORS},
            "layout": [asdict(layer) | {"parameters": list(layer.parameters)} for layer in self.layout],
            "sketch": dict(self.sketch),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ClassGradients:
        """Return the gradients of a :meth:`state_dict`.

        Raises:
            ValueError: a key is missing, or the parts do not fit each other.
        """
        missing = {*_TENSORS, "layout", "sketch"} - set(state)
        if missing:
            raise ValueError(f"state: got the keys {sorted(state)}, expected {', '.join(sorted(missing))} among them")
        try:
            layout = tuple(
                LayerSketch(
                    layer["name"],
                    tuple(layer["parameters"]),
                    (layer["shape"][0], layer["shape"][1]),
                    layer["rows"],
                    layer["columns"],
                    layer["start"],
                )
                for layer in state["layout"]
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"state: got a layout that cannot be read ({error!r}), expected a list of layers"
            ) from None
        classes, vectors, counts, squares = (state[name] for name in _TENSORS)
        result = cls(classes, vectors, counts, squares, layout, dict(state["sketch"]))
        size = layout[-1].stop if layout else 0
        expected = {
            "classes": (len(result.classes),),
            "vectors": (len(result.classes), size),
            "counts": (len(result.classes),),
            "square_norms": (len(result.classes), len(layout)),
        }
        for name in result._names:
            shape = expected[name]
            if tuple(getattr(result, name).shape) != shape:
                raise ValueError(f"state: got {name} of shape {tuple(getattr(result, name).shape)}, expected {shape}")
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically; needs the package ``safetensors``.

        Raises:
            ImportError: the package is not installed.
        """
        save_file = _safetensors().torch.save_file
        state = self.state_dict()
        tensors = {name: state.pop(name).detach().cpu().contiguous() for name in self._names}
        about = {"format": _FORMAT, "version": _VERSIONS[self.square_norms is not None], "about": json.dumps(state)}
        temporary = Path(f"{os.fspath(path)}.part")
        try:
            save_file(tensors, temporary, about)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ClassGradients:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of another kind.
            ImportError: the package ``safetensors`` is not installed.
        """
        safetensors = _safetensors()
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: there is no file {os.fspath(path)}")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except Exception as error:
            raise ValueError(f"path: {os.fspath(path)} cannot be read as safetensors: {error}") from None
        if about.get("format") != _FORMAT or about.get("version") not in _VERSIONS.values():
            came = f"format {about.get('format')!r}, version {about.get('version')!r}"
            raise ValueError(f"path: {os.fspath(path)} has {came}, expected {_FORMAT!r}, version '1' or '2'")
        return cls.from_state_dict({**tensors, **json.loads(about["about"])})


def _safetensors() -> Any:
    """Return the package with its module for torch; only :meth:`ClassGradients.save` and ``load`` need it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("safetensors is needed to save and load class gradients: pip install safetensors") from None
    return safetensors


class ClassGradientAverage:
    """Exponential moving average of the classes' mean gradients over steps.

    The average of a class starts at its first mean, and then moves by ``1 - decay`` towards the mean of each step in
    which the class occurs. It stays as it is in all other steps.

    Args:
        decay: in [0, 1): weight of the past.

    Attributes:
        value: :class:`gradmix.ClassGradients` with the averages, each counted as one sample; None before the first
            update.

    Raises:
        TypeError, ValueError: ``decay`` is no number in [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay: got {type(decay).__name__}, expected a number in [0, 1)")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
        self.decay = float(decay)
        self.value: ClassGradients | None = None

    def update(self, gradients: ClassGradients) -> ClassGradients:
        """Add the gradients of a step and return the average.

        Raises:
            ValueError: the sketches or the layers differ, or only one has norms; the object is then unchanged.
        """
        counts, squares = gradients.counts.to(gradients.vectors.dtype)[:, None], gradients.square_norms
        step = replace(
            gradients,
            vectors=gradients.vectors / counts,
            counts=torch.ones_like(gradients.counts),
            square_norms=None if squares is None else squares / counts,
        )
        if self.value is None:
            self.value = step
            return step
        self.value._check(step)
        known = torch.isin(step.classes, self.value.classes)
        merged = self.value._with_classes(step.classes)
        index = torch.searchsorted(merged.classes, step.classes)
        weight = torch.where(known, 1 - self.decay, 1.0).to(step.vectors)[:, None]
        for name in set(step._names) - {"classes", "counts"}:
            mine = getattr(merged, name)
            mine[index] = torch.lerp(mine[index], getattr(step, name).to(mine), weight)
        merged.counts.fill_(1)
        merged.ways |= step.ways
        self.value = merged
        return merged
