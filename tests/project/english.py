"""Words and constructions that docstrings and comments of this package avoid (docs/style.md, rules 2 and 3).

``python tests/project/english.py FILE ...`` prints what is found; ``test_ratchet.py`` holds the number of each file.
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

PARTICIPLES = frozenset(
    {
        "agreed",
        "asked",
        "chosen",
        "converted",
        "drawn",
        "found",
        "given",
        "grown",
        "heard",
        "judged",
        "kept",
        "known",
        "left",
        "made",
        "marked",
        "mixed",
        "named",
        "narrowed",
        "seen",
        "sent",
        "settled",
        "shown",
        "taken",
        "told",
        "thought",
        "wanted",
        "written",
    }
)
"""Function names that do not say who does what."""


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
    """What is to be written otherwise, a line each."""
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
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") in PARTICIPLES:
            found.append(f"def {node.name}: a verb, or what it returns")
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for line in findings(Path(name).read_text(encoding="utf-8")):
            print(f"{name}: {line}")
