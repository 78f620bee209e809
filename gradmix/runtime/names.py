"""Names that were given by others, shown as text and as nothing else: on a terminal, in Markdown, HTML and plots.

Names of classes, arms, files and settings may hold anything that a folder's name may. What a run keeps of them
(``metrics.json``, ``results.json``) is as it was given; these functions are for what is read by people.
"""

from __future__ import annotations

import re
import shlex
import unicodedata

# Controls, formats such as changes of direction, lone surrogates, and the separators of lines and paragraphs.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Joiners, which are formats too, are part of emoji and of words in some scripts.
_JOINERS = "\u200c\u200d"
# Signs that begin something wherever they stand; brackets and ampersands only where more of it follows.
_INLINE = re.compile(r"[\\`*_<$~]|\](?=[(\[:])|&(?=[#\w])")
# What begins a heading, a quotation, an item of a list or a rule.
_BLOCK = re.compile(r"^([#=+>-]|\d+(?=[.)]))")


def shown(text: str) -> str:
    r"""``text`` in one line, with an escape in place of every character that cannot be seen or steers a terminal.

    Example:
        >>> shown("cat\x1b[31m\ndog")
        'cat\\x1b[31m\\ndog'
    """
    if text.isprintable():
        return text
    return "".join(_escape(sign) if unicodedata.category(sign) in _UNSEEN else sign for sign in text)


def markdown(text: str) -> str:
    r"""The same as a paragraph of Markdown in which nothing is code, a link, a formula, HTML, a list or a heading.

    Example:
        >>> print(markdown("# a_b [c](d) $x$"))
        \# a\_b [c\](d) \$x\$
    """
    return _BLOCK.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", _inline(text).lstrip())


def markdown_cell(text: str) -> str:
    """The same in a cell of a table."""
    return _inline(text).replace("|", "\\|")


def shell(word: str) -> str:
    """A word of a command as a shell reads it; with bash's escapes where it cannot be shown otherwise."""
    if shown(word) == word:
        return shlex.quote(word)
    raw = word.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in raw) + "'"


def _inline(text: str) -> str:
    return _INLINE.sub(r"\\\g<0>", shown(text))


def _escape(sign: str) -> str:
    if sign in _JOINERS:
        return sign
    # As Python writes it, lone surrogates included.
    return ascii(sign)[1:-1]
