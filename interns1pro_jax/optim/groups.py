"""Which parameters are trained, and how fast: groups by the path of a parameter in the model.

A group is named by a word of `PARTS`, or by a regular expression for the beginning of a path such as `text/runs/0/attention/q_DQH`.
What is frozen is no parameter of the training state: it has no gradient and no moments, and lies beside the buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from interns1pro_jax.config import ConfigError

# `language` includes the routers; the time-series tower includes its projector.
PARTS: Mapping[str, str] = {
    "vision": r"vision/(?!merger/)",
    "projector": r"vision/merger/",
    "language": r"text/",
    "router": r"text/.*/router/",
    "time_series": r"time_series/",
}


def path_name(path: Iterable[Any]) -> str:
    """The path of a parameter as text, of an NNX path or of one of a pytree of variables."""
    keys = (getattr(part, "key", getattr(part, "idx", part)) for part in path if not isinstance(part, jax.tree_util.GetAttrKey))
    return "/".join(map(str, keys))


def is_in(group: str, path: str) -> bool:
    """Whether a parameter belongs to a group."""
    return re.match(PARTS.get(group, group), path) is not None


def check_groups(what: str, groups: Iterable[str], paths: Sequence[str]) -> None:
    """Raises `ConfigError` where a group has no parameter: a misspelt one would be trained as all others."""
    for group in groups:
        if not any(is_in(group, path) for path in paths):
            raise ConfigError(
                f"{what} names {group!r}, which is the beginning of no parameter's path; use {', '.join(PARTS)}, or an expression for "
                f"paths such as {paths[0]} and {paths[-1]}."
            )


def trained_parameters(kind: type[nnx.Variable], frozen: Sequence[str]) -> nnx.filterlib.Filter:
    """A filter for the variables of a `kind` that are in none of the frozen groups."""

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        return not any(is_in(group, path_name(path)) for group in frozen)

    return nnx.All(kind, is_trained)


def learning_rate_factors(params: Any, factors: Mapping[str, float]) -> Any:
    """The product of the factors of the groups that each parameter is in, in the place of its array."""

    def factor(path: tuple[Any, ...], _: jax.Array) -> float:
        result = 1.0
        for group, value in factors.items():
            result *= value if is_in(group, path_name(path)) else 1.0
        return result

    return jax.tree_util.tree_map_with_path(factor, params)
