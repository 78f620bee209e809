"""Names from outside as plain text, without control characters or markup: on a terminal, in Markdown and in plots.

Names of classes, arms, files and settings may contain anything that a folder's name may. A run stores them unchanged
(``metrics.json``, ``results.json``); these functions are for display.
"""

from __future__ import annotations

import re
import shlex
import unicodedata

# Controls, formats such as changes of direction, lone surrogates, and the separators of lines and paragraphs.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Joiners, which are formats too, are part of emoji and of words in some scripts.
_JOINERS = "\u200c\u200d"
# Characters that begin markup anywhere; brackets and ampersands only with the characters that follow them.
_INLINE = re.compile(r"[\\`*_<$~]|\](?=[(\[:])|&(?=[#\w])")
# The beginning of a heading, a quotation, an item of a list or a rule.
_BLOCK = re.compile(r"^([#=+>-]|\d+(?=[.)]))")


def escape_unprintable(text: str) -> str:
    r"""Return ``text`` in one line, with an escape for every invisible character and every control of a terminal.

    Example:
        >>> escape_unprintable("cat\x1b[31m\ndog")
        'cat\\x1b[31m\\ndog'
    """
    if text.isprintable():
        return text
    return "".join(_escape(sign) if unicodedata.category(sign) in _UNSEEN else sign for sign in text)


shown = escape_unprintable
"""The name that training and the command line still use."""


def markdown(text: str) -> str:
    r"""Return ``text`` as a paragraph of Markdown without code, links, formulae, HTML, lists or headings.

    Example:
        >>> print(markdown("# a_b [c](d) $x$"))
        \# a\_b [c\](d) \$x\$
    """
    return _BLOCK.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", _inline(text).lstrip())


def markdown_cell(text: str) -> str:
    """Return ``text`` as a cell of a table in Markdown."""
    return _inline(text).replace("|", "\\|")


def shell(word: str) -> str:
    """Return a word of a command, quoted for a shell; with bash's escapes for invisible characters."""
    if escape_unprintable(word) == word:
        return shlex.quote(word)
    raw = word.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in raw) + "'"


def _inline(text: str) -> str:
    return _INLINE.sub(r"\\\g<0>", escape_unprintable(text))


def _escape(sign: str) -> str:
    if sign in _JOINERS:
        return sign
    # As Python writes it, lone surrogates included.
    return ascii(sign)[1:-1]
