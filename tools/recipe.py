"""The model and the data of a recipe, for tools that work with them outside of a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import gin

from experiments import bindings, launch
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says: the model has the placeholder ids of the tokenizer."""

    model: ModelConfig
    corpus: Corpus
    tokenizer: Tokenizer


@gin.configurable
def _parts(model: ModelConfig = gin.REQUIRED, corpus: Corpus = gin.REQUIRED) -> tuple[ModelConfig, Corpus]:
    return model, corpus


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `experiments.launch` that name a recipe."""
    parser.add_argument("--gin_file", action="append", required=True, help="recipe; several are read one after the other")
    parser.add_argument("--gin_param", action="append", default=[], help="binding that overrides the recipe")


def read_recipe(files: Sequence[str], params: Sequence[str] = ()) -> Recipe:
    """Reads a recipe that trains on a corpus: what `experiments.launch` would, given the same --gin_file and --gin_param.

    Raises:
      ConfigError: its tokenizer cannot be read.
    """
    bindings.register()
    gin.add_config_file_search_path(str(launch.ROOT))
    launch.parse(list(files), [*params, "_parts.model = @ModelConfig()", "_parts.corpus = @Corpus()"])
    model, corpus = _parts()
    tokenizer = corpus.load_tokenizer()
    ids: dict[str, Any] = {**base.model_token_ids(tokenizer)}
    return Recipe(dataclasses.replace(model, **ids), corpus, tokenizer)
