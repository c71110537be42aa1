"""A small source of one router group, in the released layout."""

import dataclasses
from pathlib import Path

import jax
import pytest

from interns1pro_jax.checkpoint.hf_export import export_model
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.families import RELEASED
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.sharding import make_mesh
from tests.tiny import text_only


def source_config(family: str = RELEASED, **changes) -> ModelConfig:
    """Eight experts, two per token, three layers of which the first is dense; plain rotary encoding."""
    small = dict(num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, router_n_groups=1, mlp_only_layers=(0,), fope=None)
    return dataclasses.replace(text_only(**small | changes), family=family)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "released"
    with jax.set_mesh(make_mesh()):
        export_model(create_model(source_config()), source_config(), directory, max_file_bytes=20_000)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory
