"""Documentation of scientific packages: its prose with formulas, and all of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from interns1pro_jax.data.records import Document, TextPart
from interns1pro_jax.data.samples.packages import Archives, Sample

SOURCE, SOURCE_ALL = "prose", "documentation"
_PACKAGES = ("sympy", "mpmath", "networkx", "scipy", "scikit-learn", "scikit-image")
_FORMULA = re.compile(r":math:`|\.\. math::|\$[^$\n]+\$")
_SHORTEST, _LONGEST = 400, 3000  # characters
_SHORTEST_OF_ALL = 200


def samples(archives: Archives) -> Iterator[Sample]:
    """Every docstring of moderate length with a formula in it, once."""
    # Asked of whole files first, which spares the parser most of them.
    return _once(archives, SOURCE, _FORMULA.search, without_examples, lambda t: _SHORTEST <= len(t) <= _LONGEST and _FORMULA.search(t))


def documentation(archives: Archives) -> Iterator[Sample]:
    """Every docstring that is not short, once, with its examples: ten times as much text."""
    return _once(archives, SOURCE_ALL, bool, str, lambda text: len(text) >= _SHORTEST_OF_ALL)


def _once(
    archives: Archives,
    source: str,
    is_wanted_file: Callable[[str], object],
    edited: Callable[[str], str],
    is_wanted: Callable[[str], object],
) -> Iterator[Sample]:
    """Docstrings of the packages. A module is a group: its docstrings share sentences."""
    seen: set[str] = set()
    for package in _PACKAGES:
        for file in archives.names(package):
            if not file.endswith(".py") or "/tests/" in file:
                continue
            content = archives.read(package, file).decode()
            if not is_wanted_file(content):
                continue
            for name, text in _docstrings(content):
                text = edited(text)
                if is_wanted(text) and text not in seen:
                    seen.add(text)
                    parts = (TextPart(f"{name}\n\n{text}" if name else text),)
                    yield Sample(file, Document(parts, source, archives.licence(package), f"{file}:{name}", ("text", package)))


def without_examples(text: str) -> str:
    """The text without interactive sessions: from a line with a prompt to the next empty line."""
    kept: list[str] = []
    session = False
    for line in text.splitlines():
        session = line.lstrip().startswith(">>>") or (session and bool(line.strip()))
        if not session:
            kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module and of the classes and functions in it; the module's own name is empty."""
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if text := ast.get_docstring(node):
            yield getattr(node, "name", ""), text
        waiting += [child for child in reversed(node.body) if isinstance(child, ast.ClassDef | ast.FunctionDef)]
