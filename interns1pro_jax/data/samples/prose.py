"""Documentation prose with formulas: the docstrings of scientific packages that contain mathematics."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from interns1pro_jax.data.records import Document, TextPart
from interns1pro_jax.data.samples.packages import Archives, Sample

SOURCE = "prose"
_PACKAGES = ("sympy", "mpmath", "networkx", "scipy", "scikit-learn", "scikit-image")
_FORMULA = re.compile(r":math:`|\.\. math::|\$[^$\n]+\$")
_SHORTEST, _LONGEST = 400, 3000  # characters


def samples(archives: Archives) -> Iterator[Sample]:
    """Every docstring of moderate length with a formula in it, once. A module is a group: its docstrings share sentences."""
    seen: set[str] = set()
    for package in _PACKAGES:
        for file in archives.names(package):
            if not file.endswith(".py") or "/tests/" in file:
                continue
            source = archives.read(package, file).decode()
            if not _FORMULA.search(source):  # spares the parser most files
                continue
            for name, text in _docstrings(source):
                text = without_examples(text)
                if _SHORTEST <= len(text) <= _LONGEST and _FORMULA.search(text) and text not in seen:
                    seen.add(text)
                    parts = (TextPart(f"{name}\n\n{text}" if name else text),)
                    yield Sample(file, Document(parts, SOURCE, archives.licence(package), f"{file}:{name}", ("text", package)))


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
