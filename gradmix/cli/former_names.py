"""Former names of methods on the command line: each is said once, in a line on stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def print_former_names() -> Iterator[None]:
    """Print, in place of the warning, what a method that is called by its former name is called now.

    Python hides deprecation warnings from users of a command. Other warnings are passed on.
    """
    from gradmix.training.method_names import FormerNameWarning

    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FormerNameWarning)
            yield
    finally:
        said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, FormerNameWarning))
        for text in said:
            print(f"gradmix: {text}", file=sys.stderr)
        for other in caught:
            if not issubclass(other.category, FormerNameWarning):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno, source=other.source)
