"""Names of classes as folders have them: which of two folders mean one class, and what is wrong where they do not."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable


def printable(name: str) -> str:
    r"""A name or path with bytes that are no UTF-8 as escapes, so that it can be printed and saved.

    >>> printable("caf\udce9")  # as Python reads the bytes "caf\xe9"
    'caf\\xe9'
    """
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character of UTF-16
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def same_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Which of ``names`` each of ``others`` is, where it is one.

    Names are the same if they are equal, or equal in normal form: folders that were packed on a Mac have decomposed
    letters, others composed ones. Normal forms decide only between names that have no equal, and where there is one on
    each side.

    >>> same_names(["Müller", "cat"], ["Mu\u0308ller", "Cat"])
    {'Mu\u0308ller': 'Müller'}
    """
    names, others = set(names), set(others)
    left, right = _by_form(names - others), _by_form(others - names)
    pairs = {name: name for name in names & others}
    for form, found in right.items():
        if len(found) == 1 and len(left[form]) == 1:
            pairs[found[0]] = left[form][0]
    return pairs


def look_alikes(names: Iterable[str], others: Collection[str], where: str) -> str:
    """Name, for an error about missing names, those in ``where`` that look alike, and how they differ.

    >>> look_alikes(["cat", "dog"], ["Cat", "bird"], "val")
    "; val has 'Cat' for 'cat', which differs in case: rename one of them, or put both together"
    >>> look_alikes(["cat"], ["bird"], "val")
    ''
    """
    found = []
    for name in names:
        for other in others:
            difference = _difference(name, other)
            if difference:
                found.append(f"{where} has {other!a} for {name!a}, which differs in {difference}")
    return "".join(f"; {each}" for each in found[:3]) + (": rename one of them, or put both together" if found else "")


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[unicodedata.normalize("NFC", name)].append(name)
    return found


def _without(categories: str) -> Callable[[str], str]:
    return lambda name: "".join(letter for letter in name if unicodedata.category(letter) not in categories.split())


_VIEWS: dict[str, Callable[[str], str]] = {
    "normal form (NFC, NFD)": lambda name: unicodedata.normalize("NFKC", name),
    "case": str.casefold,
    "blanks": _without("Zs Cc"),
    "invisible characters": _without("Cf Cc"),
}


def _difference(name: str, other: str) -> str:
    """In what alone two names differ that look alike; nothing, if they are equal or do not look alike."""
    if name == other:
        return ""
    views = [name, other]
    for what, view in _VIEWS.items():
        if view(name) == view(other):
            return what
        views = [view(each) for each in views]
    return " and ".join((", ".join(list(_VIEWS)[:-1]), list(_VIEWS)[-1])) if views[0] == views[1] else ""
