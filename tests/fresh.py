"""A fresh interpreter that meets the same gradmix as the tests do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gradmix


def run_python(code: str, **environment: str) -> list[str]:
    """The lines that ``code`` prints in a process of its own; an AssertionError with its stderr if it fails."""
    here = str(Path(gradmix.__file__).parent.parent)
    # Not from the checkout: python -c searches the working directory first.
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": here} | environment,
        )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()
