"""Recipes as `experiments.launch` reads them, for tests."""

import contextlib
import functools
from collections.abc import Iterator

import gin

from experiments import bindings, launch

DIRECTORY = launch.ROOT / "configs" / "recipes"


@functools.cache
def register() -> None:
    """Makes bindable what recipes bind; gin accepts it once."""
    bindings.register()
    gin.add_config_file_search_path(str(launch.ROOT))


@contextlib.contextmanager
def recipe(name: str, *bindings: str) -> Iterator[None]:
    """A recipe and further bindings, in force meanwhile."""
    register()
    gin.clear_config(clear_constants=True)
    try:
        launch.parse([str(DIRECTORY / f"{name}.gin")], bindings)
        yield
    finally:
        gin.clear_config(clear_constants=True)
