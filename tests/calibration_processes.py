"""Functions of processes that end in ways of their own, without an import of torch."""

from __future__ import annotations

import sys
import time
from typing import Any


def leave(connection: Any, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    with open(output, "w") as file:
        file.write("a line\nno kernel image is available for execution on the device\n")
    sys.exit(3)


def hang(connection: Any, output: str, device: str, cells: list[dict[str, Any]]) -> None:
    time.sleep(60)
