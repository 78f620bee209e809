"""The project's checks by name: ``pip install nox``, then ``nox -s fast``, ``full``, ``docs`` or ``bench-smoke``.

Each session installs the package as a user does, so that the installed one is what is tested. ``nox -R -s fast`` keeps
the environment and the build of the last time. Arguments after ``--`` are pytest's: ``nox -s fast -- -k head``.
"""

import nox

nox.options.sessions = ["fast", "docs"]
nox.options.reuse_existing_virtualenvs = True
CONSTRAINTS = ("-c", "constraints.txt")


@nox.session
def fast(session: nox.Session) -> None:
    """Style, types and the fast tests: what to run before every commit."""
    session.install(*CONSTRAINTS, ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("pytest", "-m", "fast", "-n", "auto", "--dist", "worksteal", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests: what to run before a merge."""
    session.install(*CONSTRAINTS, ".[test]")
    session.run("pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)


@nox.session
def integrations(session: nox.Session) -> None:
    """The adapters in Avalanche, Lightning, transformers, timm and torchvision."""
    session.install(*CONSTRAINTS, ".[test]", "-r", "tests/integrations/requirements.txt")
    session.run("pytest", "tests/integrations", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Spelling, the links of all pages, the Python that stands in them, and the site, in ``build/site``."""
    session.install(*CONSTRAINTS, ".[test,docs]")
    session.install("codespell")
    session.run("codespell")
    session.run("pytest", *(f"tests/project/test_{name}.py" for name in ("docs", "pages", "readme")), *session.posargs)
    session.run("sphinx-build", "-W", "docs", "build/site")


@nox.session(name="bench-smoke")
def bench_smoke(session: nox.Session) -> None:
    """The benchmarks at small sizes: that they run and check their answers. Their times mean nothing."""
    session.install(*CONSTRAINTS, ".[test,bench]")
    session.run("bash", "bench/on_gpu.sh", session.create_tmp(), env={"DRY": "1"}, external=True)
    session.run("python", "bench/class_table.py", "--quick")
    for operator in ("class_sketch", "sketch_project"):
        session.run("python", f"bench/{operator}.py", "--seconds", "0.01")
