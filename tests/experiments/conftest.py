"""What recipes may bind, registered once; every test begins without bindings. A small corpus."""

from typing import Any

import gin
import pytest

from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.mixture import Source
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.preparation import PreparationConfig, write_documents
from interns1pro_jax.tokenizer.base import model_token_ids
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer
from tests import recipes
from tests.data.conftest import WORDS, make_document


@pytest.fixture(scope="session")
def registered():
    recipes.register()


@pytest.fixture(autouse=True)
def cleared(registered):
    gin.clear_config(clear_constants=True)
    yield
    gin.clear_config(clear_constants=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Text for a vocabulary of 336, in batches of 4 rows of 32 tokens."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = ByteBpeTokenizer.train([" ".join(WORDS)] * 3, 330)
    tokenizer.save(root / "tokenizer.json")
    ids: dict[str, Any] = {**model_token_ids(tokenizer)}
    encoder = DocumentEncoder(tokenizer, ModelConfig(**ids), PixelBounds(1024, 4096))
    write_documents(str(root / "text"), [make_document(n, "text") for n in range(80)], PreparationConfig("documents", None), encoder)
    pipeline = PipelineConfig(RowSize(32), batch_size=4, block=64)
    return Corpus("tokenizer.json", [Source("text", 1.0)], pipeline, str(root), held_out=["text"], evaluation_batches=1, samples=0)
