"""``python -m gradmix``: the same as the command ``gradmix``."""

from __future__ import annotations

import sys

from gradmix.cli import main

# Processes that are spawned for runs import this module under another name.
if __name__ == "__main__":
    sys.exit(main())
