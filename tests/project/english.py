"""Words and constructions that docstrings and comments of this package avoid (docs/style.md, rules 2 and 3).

``python tests/project/english.py FILE ...`` prints what is found; ``test_english.py`` fails if the packages have any.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

PHRASES = {
    # word or construction: what to write
    r"\btold\b|\btells?\b (?:one|us|people)": "is given, states",
    r"\bnobody\b|\beverybody\b": "no caller, no process, all",
    r"\bmaybe\b": "possibly",
    r"\bis thought\b|\bis believed\b|\bare believed\b": "is assumed",
    r"\bhas the say\b|\bhave the say\b": "decides",
    r"\bwhat came\b": "the value given",
    r"\bis had\b|\bare had\b": "is computed",
    r"\btold apart\b|\btell apart\b": "distinguished, significant",
    r"\brivals?\b": "baseline",
    r"\bbod(?:y|ies) of (?:an?|the|each|every) operators?\b": "implementation",
    r"\bsaid otherwise\b|\bsays otherwise\b": "given otherwise",
    r"\bunderway\b": "pending",
    r"\bfor people\b": "for display",
    r"\bmakes of\b": "computes from",
}
"""Patterns, each with what to write instead."""

ANY_PHRASE = re.compile("|".join(PHRASES), re.I)

FIRST_WORDS = ("What", "Where", "Of", "That", "How")
"""What no summary begins with: it names the thing (noun) or says what to do (imperative)."""

IRREGULAR = frozenset(
    [
        "begun",
        "bound",
        "brought",
        "built",
        "chosen",
        "done",
        "drawn",
        "found",
        "given",
        "gone",
        "grown",
        "heard",
        "held",
        "hidden",
        "kept",
        "known",
        "laid",
        "left",
        "lost",
        "made",
        "meant",
        "met",
        "paid",
        "said",
        "seen",
        "sent",
        "shown",
        "sold",
        "sought",
        "spoken",
        "stood",
        "stuck",
        "taken",
        "taught",
        "thought",
        "told",
        "torn",
        "unseen",
        "won",
        "written",
    ]
)
"""Past participles that do not end in -ed."""

NOUNS = frozenset(
    [
        "bring",
        "embed",
        "embedding",
        "feed",
        "forgetting",
        "heading",
        "learning",
        "mapping",
        "mixing",
        "need",
        "padding",
        "proceed",
        "seed",
        "setting",
        "speed",
        "string",
        "training",
    ]
)
"""Nouns and verbs, as first words, that only end like a participle."""

TERMS = frozenset(["cached", "floating", "hidden", "mixed", "paired", "weighted"])
"""Participles that are part of a term, before a noun: ``mixed_forward``, ``floating_dtype``, ``paired_difference``."""

PUBLIC_NAMES = frozenset({"moved", "seen", "seen_per_class"})
"""Names that stay: that of every stub of a module that has moved, and attributes of ``ReplayBuffer``."""


def is_participle(name: str) -> bool:
    """Whether a function's name is a participle or begins with one, and so does not say who does what."""
    words = name.strip("_").split("_")
    first = words[0]
    if name.startswith("__") or name in PUBLIC_NAMES or first in NOUNS or (first in TERMS and len(words) > 1):
        return False
    return first in IRREGULAR or (len(first) > 4 and first.endswith(("ed", "ing")))


def participles(source: str) -> list[str]:
    """Functions whose names are participles or begin with one, a line each."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        f"def {function.name}: a verb, or what it returns" for function in functions if is_participle(function.name)
    ]


def texts(source: str, nodes: list[ast.AST]) -> list[str]:
    """Docstrings (strings that stand as statements) and comments."""
    found = [
        node.value.value
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [token.string for token in tokens if token.type == tokenize.COMMENT]


def findings(source: str) -> list[str]:
    """Wordings to avoid, each with what to write instead, a line each."""
    nodes, found = list(ast.walk(ast.parse(source))), []
    for text in texts(source, nodes):
        flat = " ".join(text.split())
        if not ANY_PHRASE.search(flat):
            continue
        for pattern, instead in PHRASES.items():
            found += [f"{match[0]!r}: write {instead}" for match in re.finditer(pattern, flat, re.I)]
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            if summary.split(" ")[0] in FIRST_WORDS:
                found.append(f"{summary!r}: begin with the noun or the imperative")
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        text = Path(name).read_text(encoding="utf-8")
        for line in (*findings(text), *participles(text)):
            print(f"{name}: {line}")
