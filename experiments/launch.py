"""Runs a recipe: `python -m experiments.launch --gin_file configs/recipes/X.gin [--gin_param "a.b = 1"] [--workdir DIR]`.

With `--compile_only` it compiles the step for the hardware of the recipe's mesh, which need not be there, and reports what it needs.

A recipe binds `launch.experiment` to one of the experiments of this folder, and their parameters. A binding that names nothing
is an error, so that a misspelt parameter never trains with a default.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import gin
import jax
from absl import app, flags, logging

from experiments import bindings
from interns1pro_jax.checkpoint.errors import CheckpointError
from interns1pro_jax.checkpoint.manager import check_writable
from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.records import DataError
from interns1pro_jax.train.faults import BadStepError
from interns1pro_jax.train.watchdog import INTERRUPTED

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Recipe to run; several are read one after the other.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding that overrides the recipe, for example 'train.steps = 10'.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report go; default runs/<name of the recipe>.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile the step for the recipe's hardware and report what it needs.")

# Errors of XLA that would come again. All others are taken for a device, a network or another process that failed.
_LASTING = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")

# Where gin goes on with lines of its own in what an error says.
_OF_GIN = "\n  In call to configurable"

ROOT = Path(__file__).resolve().parents[1]


@gin.configurable
def launch(workdir: Path, compile_only: bool = False, experiment: Callable[..., None] = gin.REQUIRED) -> None:
    """Runs the experiment that the recipe names, or only compiles its step."""
    experiment(workdir, compile_only=compile_only)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; bindings are given as --gin_param 'name = value'.")
    if not _GIN_FILE.value:
        raise app.UsageError("--gin_file is missing; the recipes are in configs/recipes/.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries' accounts of every save would hide the progress
    bindings.register()
    gin.add_config_file_search_path(str(ROOT))
    parse(_GIN_FILE.value, _GIN_PARAM.value)
    run(Path(_WORKDIR.value or Path("runs") / Path(_GIN_FILE.value[0]).stem), _COMPILE_ONLY.value)


def parse(files: Sequence[str], params: Sequence[str]) -> None:
    """Reads recipes and bindings; ends the process with one line where they are wrong."""
    for file in files:
        if not Path(file).is_file() and not (ROOT / file).is_file():
            recipes = ", ".join(sorted(path.name for path in (ROOT / "configs" / "recipes").glob("*.gin")))
            sys.exit(f"error: there is no recipe {file}; configs/recipes has {recipes}.")
    try:
        gin.parse_config_files_and_bindings(list(files), list(params))
    except (OSError, SyntaxError, TypeError, ValueError) as error:  # gin's search for an absent include ends in a TypeError
        sys.exit(f"error in the recipe: {error}")


def run(workdir: Path, compile_only: bool = False) -> None:
    """Runs what was parsed; ends the process with one line where the configuration, the data or the disk is at fault, and with code
    `INTERRUPTED` where a device or another process is."""
    try:
        bindings.platform(compile_only=compile_only)
        check_writable(workdir)
        launch(workdir, compile_only)
    except (ConfigError, CheckpointError, DataError, BadStepError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()) if "\n" not in note)  # a note of JAX has more lines
        sys.exit(f"error: {str(error).partition(_OF_GIN)[0]}{notes}")
    except jax.errors.JaxRuntimeError as error:
        if compile_only or str(error).startswith(_LASTING):
            raise
        traceback.print_exc()
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    app.run(main)
