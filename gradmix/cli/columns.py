"""Text in columns, as wide as the terminal is."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

from gradmix.runtime.names import shown


def wrap_label(label: str, width: int, cells: str) -> str:
    """Write cells beside a label of so many columns, with as many lines below as a longer one needs."""
    first, *others = textwrap.wrap(shown(label), width, break_on_hyphens=False) or [""]
    return "\n".join([f"{first:<{width}}  {cells}", *others])


def label_width(labels: Iterable[str], beside: int) -> int:
    """Columns for labels: those of the longest, or what the terminal leaves beside so many columns, of 16 at least."""
    longest = max(len(shown(label)) for label in labels)
    return min(longest, max(text_width() - beside - 2, 16))


def text_width() -> int:
    """Columns for tables: the terminal's, from 80 to 120."""
    return min(max(shutil.get_terminal_size().columns, 80), 120)
