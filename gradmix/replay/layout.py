"""The layout of a sample: the parts of its input, its extras, and the shape and dtype of each.

A buffer keeps one column for each tensor of the input tree, one for each extra, and one for the labels. The column of
an input is named by its path in the tree (``x``, ``x[0]``, ``x['mask']``), the column of an extra by the extra's name,
and the column of the labels ``y``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmix.model.inputs import InputTree, check_inputs, leaves, map_tensors

LABELS = "y"
"""Name of the column of labels, which are int64 in every layout."""


@dataclass(frozen=True)
class Column:
    """Shape and dtype of one column.

    Attributes:
        shape: Shape of a sample's entry.
        dtype: Dtype of the entry.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Tensor) -> Column:
        """Return the column that holds values (N, ...)."""
        return cls(tuple(values.shape[1:]), values.dtype)

    @property
    def entry_bytes(self) -> int:
        """Bytes of a sample's entry."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the column as plain values, for a state or a JSON file."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Column:
        """Return the column that :meth:`to_dict` has described."""
        return cls(tuple(values["shape"]), getattr(torch, values["dtype"]))


@dataclass(frozen=True)
class Layout:
    """Parts of a sample, fixed by the first samples that are added.

    Attributes:
        parts: The input tree with the name of its column in place of each tensor, in plain dicts, tuples and lists.
        columns: The columns of inputs, then of extras, by name; without the labels.
    """

    parts: Any
    columns: dict[str, Column]

    @classmethod
    def of(cls, x: InputTree, columns: Mapping[str, Tensor]) -> Layout:
        """Return the layout of inputs ``x`` and of their columns (N, ...), those of inputs first."""
        return cls(_paths(x), {name: Column.of(values) for name, values in columns.items()})

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs' columns."""
        return [str(name) for _, name in leaves(self.parts)]

    @property
    def extra_names(self) -> list[str]:
        """Names of the extras."""
        inputs = set(self.input_names)
        return [name for name in self.columns if name not in inputs]

    def inputs(self, columns: Mapping[str, Tensor]) -> Any:
        """Return the input tree with the columns' values."""
        return map_tensors(lambda name: columns[name], self.parts)

    def extras(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of the extras, by name."""
        return {name: columns[name] for name in self.extra_names}

    def check(self, inputs: Mapping[str, object], columns: Mapping[str, Tensor]) -> None:
        """Check that further samples have this layout.

        Args:
            inputs: The inputs by path.
            columns: Inputs and extras (N, ...) by name.

        Raises:
            TypeError: A dtype differs.
            ValueError: Parts of the input, names of extras or a shape differ.
        """
        names = self.input_names
        if inputs.keys() != set(names):
            raise ValueError(f"x: got the parts {', '.join(inputs)}, expected {', '.join(names)} as before")
        known = {LABELS, *names}
        extras, expected = columns.keys() - known, self.columns.keys() - known
        if extras != expected:
            got, before = (", ".join(sorted(found)) or "none" for found in (extras, expected))
            raise ValueError(f"extras: got {got}, expected {before} as with the samples added before")
        for name, values in columns.items():
            column = self.columns[name]
            if values.shape[1:] != column.shape:
                raise ValueError(
                    f"{name}: got samples of shape {tuple(values.shape[1:])}, expected {column.shape} "
                    "as in the samples added before"
                )
            if values.dtype != column.dtype:
                raise TypeError(
                    f"{name}: got dtype {values.dtype}, expected {column.dtype} as in the samples added before"
                )


def no_samples(device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return inputs (0,) and labels (0,) of a buffer without a layout; without a device they are on the CPU."""
    where = device or torch.device("cpu")
    return torch.empty(0, device=where), torch.empty(0, dtype=torch.int64, device=where)


def check_samples(
    x: InputTree, y: Tensor, extras: Mapping[str, Tensor], layout: Layout | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Check samples that are to be added.

    Args:
        x: Inputs (N, ...), a tree of tensors.
        y: Labels (N,).
        extras: Extras (N, ...) by name.
        layout: The layout of the samples added before; None: these are the first.

    Returns:
        The labels (N,), int64 on the CPU, never the caller's own tensor; inputs and extras (N, ...) by column.

    Raises:
        TypeError: An argument is not a tensor, ``y`` does not hold integers, or a dtype is not the layout's.
        ValueError: The shapes do not fit each other or the layout, a label is negative, or the names of extras are not
            the layout's.
    """
    inputs = dict(leaves(x))
    for name, value in {**inputs, "y": y, **extras}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    count = check_inputs("x", x)
    columns: dict[str, Tensor] = {**inputs, **extras}  # type: ignore[dict-item]
    if y.shape != (count,):
        hint = "; y.squeeze(1) has that shape" if y.shape == (count, 1) else ""
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected ({count},), one label for every sample of x{hint}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y: got dtype {y.dtype}, expected integer labels (int64)")
    for name, value in extras.items():
        if value.shape[:1] != (count,):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected ({count}, ...), an entry for every sample of x"
            )
    if layout is not None:
        layout.check(inputs, columns)
    labels = y.detach().to("cpu", torch.int64)
    if len(labels) > 0 and int(labels.min()) < 0:
        raise ValueError(
            f"y: got label {int(labels.min())}, expected labels of at least 0; samples without a class, y < 0, are to "
            "be left out"
        )
    return labels, columns


def _paths(x: Any, path: str = "x") -> Any:
    """Return the tree with the path of each leaf in its place, in plain dicts, tuples and lists."""
    if isinstance(x, Mapping):
        return {key: _paths(value, f"{path}[{key!r}]") for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [_paths(value, f"{path}[{index}]") for index, value in enumerate(x)]
        return tuple(parts) if isinstance(x, tuple) else parts
    return path
