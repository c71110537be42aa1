"""One golden file while it is checked: what was compared, how well, and what is still uncovered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Limits of the reference README, for float32 arithmetic of full precision.
ACTIVATION = 1e-4  # absolute, on activations, logits, losses and full gradients
ROUTER_WEIGHT = 1e-5  # absolute, on probabilities
GRADIENT_NORM = 1e-4  # relative


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst element of one array: its error beside what was allowed there."""

    array: str
    error: float
    tolerance: float
    relative: bool = False

    @property
    def ratio(self) -> float:
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else np.inf
        return self.error / self.tolerance


@dataclasses.dataclass
class Share:
    """How many of some things are equal."""

    equal: int = 0
    total: int = 0

    def add(self, equal: np.ndarray) -> None:
        self.equal += int(equal.sum())
        self.total += equal.size

    def __str__(self) -> str:
        if not self.total:
            return "-"
        return "all" if self.equal == self.total else f"{self.equal}/{self.total}"


@dataclasses.dataclass
class Row:
    """What came out for one file.

    Attributes:
      file: path within the reference directory.
      arrays: arrays in the file; compared: those that were compared, the others are inputs.
      comparisons: numeric ones, in order.
      experts: equal expert ids (tokens x MoE layers); bf16_experts: the same in bfloat16, where they need not be equal.
      generated: equal generated ids.
      problems: why the row fails; none if it passes. notes: what a reader should know.
    """

    file: str
    arrays: int = 0
    compared: int = 0
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    experts: Share = dataclasses.field(default_factory=Share)
    bf16_experts: Share = dataclasses.field(default_factory=Share)
    generated: Share = dataclasses.field(default_factory=Share)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> Comparison | None:
        """The comparison closest to, or furthest beyond, its tolerance."""
        return max(self.comparisons, key=lambda c: c.ratio, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: infinite errors are written as strings."""
        content = {**dataclasses.asdict(self), "passed": self.passed}
        for comparison in content["comparisons"]:
            comparison["error"] = comparison["error"] if np.isfinite(comparison["error"]) else str(comparison["error"])
        return content


class Golden:
    """The named arrays of a golden file. Each must be read as an input or compared; `finish` reports those that were not.

    Args:
      file: name in the report.
      arrays: name to array.
      document: what a `.json` holds, as a whole.
    """

    def __init__(self, file: str, arrays: Mapping[str, Any], document: Any = None):
        self.row = Row(file, arrays=len(arrays))
        self.document = document
        self._arrays = arrays
        self._inputs: set[str] = set()
        self._compared: set[str] = set()

    @classmethod
    def open(cls, path: Path, file: str) -> Golden:
        """Reads `.npz`; or `.json`, with the paths of its leaves joined by `/` as names, and null as zero (no gradient)."""
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return cls(file, dict(arrays))
        document = json.loads(path.read_text())
        return cls(file, {name: 0.0 if leaf is None else leaf for name, leaf in flatten(document)}, document)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def input(self, name: str) -> Any:
        """An array that the check needs, and does not compare."""
        if name not in self._arrays:
            raise KeyError(f"{self.row.file} lacks array {name!r}")
        self._inputs.add(name)
        return self._arrays[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return np.shape(self._arrays[name])

    def get(self, name: str, default: Any = None) -> Any:
        """`input` of an array that may be absent."""
        return self.input(name) if name in self else default

    def compare(
        self, name: str, value: Any, tolerance: Any = ACTIVATION, where: np.ndarray | None = None, *, relative: bool = False
    ) -> None:
        """Compares an array with ours, if the file has it.

        Args:
          value: ours, of the same shape.
          tolerance: allowed error, a number or an array that broadcasts to the shape.
          where: the elements that count; broadcasts to the shape.
          relative: errors are divided by the golden magnitude.
        """
        if name not in self:
            return
        self._compared.add(name)
        golden = np.asarray(self._arrays[name], np.float64)
        value = np.asarray(value, np.float64)
        if golden.shape != value.shape:
            self.problem(f"{name}: shape {golden.shape}, ours is {value.shape}")
            return
        if not golden.size:
            return
        counts = np.broadcast_to(True if where is None else where, golden.shape)
        if not counts.any():
            self.problem(f"{name}: no element to compare")
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(value - golden) / (np.abs(golden) if relative else 1.0)
        error = np.where(value == golden, 0.0, np.where(np.isfinite(error), error, np.inf))
        limit = np.broadcast_to(np.asarray(tolerance, np.float64), golden.shape)
        excess = np.where(counts, error - limit, -np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(counts, np.where(error > 0, error / limit, 0.0), -1.0)
        at = np.unravel_index(np.argmax(ratio), ratio.shape)
        self.row.comparisons.append(Comparison(name, float(error[at]), float(limit[at]), relative))
        if over := int((excess > 0).sum()):
            self.problem(
                f"{name}: {'relative ' if relative else ''}error {error[at]:.3g} exceeds {limit[at]:.3g} at {tuple(map(int, at))} "
                f"(official {golden[at]:.7g}, ours {value[at]:.7g}); {over} of {int(counts.sum())} values are off"
            )

    def equal(self, name: str, value: Any, where: np.ndarray | None = None) -> None:
        """Compares numbers that must be equal."""
        self.compare(name, value, 0.0, where)

    def same(self, name: str, value: Any) -> None:
        """Compares a string, a number or a list of them, that must be equal."""
        golden = self.judged(name)
        if golden != value:
            self.problem(f"{name}: {value!r:.200}, official {golden!r:.200}")

    def judged(self, name: str) -> Any:
        """An array that the check compares by itself, reporting through `problem`, `row.experts` or `row.generated`."""
        self.input(name)
        self._compared.add(name)
        return self._arrays[name]

    def problem(self, text: str) -> None:
        self.row.problems.append(text)

    def note(self, text: str) -> None:
        self.row.notes.append(text)

    def finish(self) -> Row:
        """The row, after a check that ran to its end."""
        self.row.compared = len(self._compared)
        if left := sorted(set(self._arrays) - self._inputs - self._compared):
            self.problem(f"not covered: {', '.join(left)}")
        if not self._compared:
            self.problem("nothing was compared")
        return self.row


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON document, with their paths, joined by `/`, as names. An array of numbers or strings is a leaf."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}{key}/")
    elif isinstance(content, list) and any(isinstance(item, dict | list) for item in content):
        for index, value in enumerate(content):
            yield from flatten(value, f"{prefix}{index}/")
    else:
        yield prefix.removesuffix("/"), content
