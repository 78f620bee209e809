"""Limits on files, functions, parameters and import cycles; today's exceptions may only shrink.

``ratchet_exceptions.py`` lists what exceeds a limit, with its figure. A figure above its entry fails, and one below it
fails until the entry is lowered. After moving files, ``python tests/project/test_ratchet.py --write`` writes the list
anew and prints the differences; what has grown is to be split up, not written down.
``python tests/project/test_ratchet.py --summary [checkout]`` counts files, lines and what exceeds the limits.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from ratchet_exceptions import EXCEPTIONS

ROOT = Path(sys.argv[2] if sys.argv[1:2] == ["--summary"] and sys.argv[2:] else Path(__file__).parents[2]).resolve()
PACKAGE = ROOT / "gradmix"
FILE = Path(__file__).with_name("ratchet_exceptions.py")

LIMITS = {
    "lines of a file": 500,
    "lines of a function": 100,
    "parameters": 7,
    "modules in an import cycle": 1,
}
"""Largest figure that needs no entry."""

PUBLIC = ("gradmix", "gradmix.gradients", "gradmix.training.loop.trainer", "gradmix.training.streams")
"""Modules whose ``__all__`` is the public API, whose parameters are not limited: most are keywords with defaults.

The last two are those of docs/training.md. Operators are none of them: their tensors travel together, as a ``Side``.
"""

ELSEWHERE = ("gradmix.kernels", "gradmix._C")
"""Modules of the installed package that are made from other folders."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    files = sorted(PACKAGE.rglob("*.py"))
    parts = {file: [*file.relative_to(ROOT).with_suffix("").parts] for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def path_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def functions(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Function]]:
    """All functions below ``node``, each with the names of the classes and functions it stands in and its own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield (*names, child.name), child
        named = isinstance(child, Function | ast.ClassDef)
        yield from functions(child, (*names, child.name) if named else names)


def lines_of(function: Function) -> int:
    """Lines from ``def`` to the end, without those of the docstring."""
    first = function.body[0]
    doc = first if ast.get_docstring(function, clean=False) is not None else None
    docstring = 0 if doc is None else (doc.end_lineno or doc.lineno) - doc.lineno + 1
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def parameters(function: Function) -> int:
    """How many parameters a function has, ``self`` and ``cls`` not counted."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    variable = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return len(names) + len(variable) - (names[:1] in (["self"], ["cls"]))


@cache
def public_names() -> frozenset[str]:
    names: set[str] = set()
    for package in PUBLIC:
        for node in tree(modules()[package]).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
                names.update(ast.literal_eval(node.value))
    return frozenset(names)


def is_public(names: tuple[str, ...]) -> bool:
    """Whether it is a function of the public API, or a constructor or public method of a class of it."""
    return names[0] in public_names() and all(not n.startswith("_") or n == "__init__" for n in names)


# ------------------------------------------------------------------------------------------------------- import cycles


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below ``node``, those in functions included, those for annotations alone left out."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in node.orelse if is_type_checking(node) else ast.iter_child_nodes(node):
        yield from import_nodes(child)


def imported(module: str) -> set[str]:
    """The package's modules that ``module`` imports, itself left out.

    ``import gradmix.a.b`` counts as an import of ``gradmix.a.b`` alone: that Python runs ``gradmix`` and ``gradmix.a``
    first is so for every module in them, and says nothing of this one.
    """
    found: set[str] = set()
    for node in import_nodes(tree(modules()[module])):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        assert node.level == 0, f"{module}: imports in this package are absolute"
        for alias in node.names:
            if f"{node.module}.{alias.name}" in ELSEWHERE:
                continue
            submodule = f"{node.module}.{alias.name}"
            found.add(submodule if submodule in modules() else str(node.module))
    return {name for name in found if name in modules()} - {module}


def cycles(edges: dict[str, set[str]]) -> dict[str, int]:
    """How many modules reach each module and are reached by it, itself included; 1: it is in no cycle."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        todo, seen = list(edges[start]), set()
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo.extend(edges[module])
        reached[start] = seen
    return {a: 1 + sum(b != a and a in reached[b] for b in reached[a]) for a in edges}


# ------------------------------------------------------------------------------------------------------------- figures


def figures(kind: str) -> dict[str, int]:
    """The figure of everything that is measured."""
    found: dict[str, int] = {}
    if kind == "modules in an import cycle":
        found = {path_of(modules()[m]): n for m, n in cycles({m: imported(m) for m in modules()}).items()}
    elif kind == "lines of a file":
        found = {path_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in modules().values()}
    else:
        for file in modules().values():
            for names, function in functions(tree(file)):
                key = f"{path_of(file)}::{'.'.join(names)}"
                if kind == "lines of a function":
                    figure = lines_of(function)
                else:
                    figure = 0 if is_public(names) else parameters(function)
                found[key] = max(figure, found.get(key, 0))
    return found


def above_limit(kind: str) -> dict[str, int]:
    return {key: figure for key, figure in sorted(figures(kind).items()) if figure > LIMITS[kind]}


def differences(kind: str, entries: dict[str, int]) -> list[str]:
    """What is to be done, a line each, until figures and entries agree."""
    found = above_limit(kind)
    lines = []
    for key in sorted(found.keys() | entries.keys()):
        figure, entry = found.get(key), entries.get(key)
        if entry is None:
            lines.append(f"{key}: {kind}: got {figure}, expected at most {LIMITS[kind]}")
        elif figure is None:
            lines.append(f"{key}: {kind}: no longer above {LIMITS[kind]}: delete the entry {entry}")
        elif figure > entry:
            lines.append(f"{key}: {kind}: got {figure}, expected at most {entry}, as before")
        elif figure < entry:
            lines.append(f"{key}: {kind}: got {figure}: lower the entry {entry}")
    return lines


def write() -> None:
    """Write the list anew, and print what has grown."""
    for kind in LIMITS:
        for line in differences(kind, EXCEPTIONS.get(kind, {})):
            print(line)
    lines = ['"""What exceeds a limit of ``test_ratchet.py``, which writes this file: entries may only shrink."""', ""]
    lines += ["EXCEPTIONS: dict[str, dict[str, int]] = {"]
    for kind in LIMITS:
        entries = above_limit(kind)
        if entries:
            lines += [
                f'    "{kind}": {{',
                *(f'        "{key}": {figure},' for key, figure in entries.items()),
                "    },",
            ]
        else:
            lines.append(f'    "{kind}": {{}},')
    FILE.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def summary(of: Callable[[str], bool]) -> dict[str, int]:
    """The counts of the files that ``of`` selects by path."""
    found = {kind: {key: f for key, f in figures(kind).items() if of(key.partition("::")[0])} for kind in LIMITS}
    lines = found["lines of a file"].values()
    return {
        "files": len(lines),
        "lines": sum(lines),
        "longest file": max(lines),
        "files over 400 lines": sum(n > 400 for n in lines),
        "functions over 7 parameters": sum(n > 7 for n in found["parameters"].values()),
        "modules in an import cycle": sum(n > 1 for n in found["modules in an import cycle"].values()),
    }


def print_summary() -> None:
    """The counts of the core, and of training and the command line."""
    trainer = ("gradmix/training/", "gradmix/cli/")
    parts = [summary(lambda path: not path.startswith(trainer)), summary(lambda path: path.startswith(trainer))]
    print(f"{'':30} {'core':>8} {'training, cli':>14}")
    for name in parts[0]:
        print(f"{name:30} {parts[0][name]:8} {parts[1][name]:14}")


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", LIMITS)
def test_nothing_grows(kind):
    assert PACKAGE.is_dir(), "the tests measure the package's source beside them"
    lines = differences(kind, EXCEPTIONS.get(kind, {}))
    assert not lines, "\n" + "\n".join(lines)


def test_every_kind_of_exception_is_checked():
    assert EXCEPTIONS.keys() <= LIMITS.keys()


def test_cycles_are_found_in_functions_too():
    source = (
        "def f():\n    from gradmix import head\n\nif TYPE_CHECKING:\n    import gradmix.names\nelse:\n    import os\n"
    )
    assert [ast.unparse(node) for node in import_nodes(ast.parse(source))] == ["from gradmix import head", "import os"]
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert cycles(edges) == {"a": 1, "b": 2, "c": 2, "d": 1}


def test_parameters_are_counted():
    source = "def f(a, /, b, *c, d, **e): ...\nclass A:\n    def g(self, x): ..."
    (_, function), (names, method) = functions(ast.parse(source))
    assert parameters(function) == 5
    assert lines_of(ast.parse('def f():\n    """One\n    two."""\n    return 1').body[0]) == 2
    assert (names, parameters(method)) == (("A", "g"), 1)


def test_a_figure_above_or_below_its_entry_is_told(monkeypatch):
    found = {"gradmix/a.py": 600, "gradmix/b.py": 600, "gradmix/c.py": 600, "gradmix/d.py": 500}
    monkeypatch.setattr(sys.modules[__name__], "figures", lambda kind: found)
    entries = {"gradmix/b.py": 601, "gradmix/c.py": 599, "gradmix/d.py": 501}
    assert differences("lines of a file", entries) == [
        "gradmix/a.py: lines of a file: got 600, expected at most 500",
        "gradmix/b.py: lines of a file: got 600: lower the entry 601",
        "gradmix/c.py: lines of a file: got 600, expected at most 599, as before",
        "gradmix/d.py: lines of a file: no longer above 500: delete the entry 501",
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    elif sys.argv[1:2] == ["--summary"]:
        print_summary()
    else:
        sys.exit("usage: python tests/project/test_ratchet.py --write | --summary [checkout]")
