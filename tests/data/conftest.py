"""A small tokenizer, a small model's sizes, and documents of every kind."""

import numpy as np
import pytest

from interns1pro_jax.config import ModelConfig, TextConfig, TimeSeriesConfig, VisionConfig
from interns1pro_jax.data.corpus import Corpus
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.mixture import Source
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.plan import PipelineConfig
from interns1pro_jax.data.preparation import PreparationConfig, write_documents
from interns1pro_jax.data.records import Document, ImagePart, SignalPart, TextPart
from interns1pro_jax.tokenizer.base import model_token_ids
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer

WORDS = ["the", "wave", "of", "energy", "meets", "a", "crystal", "lattice", "where", "phonons", "scatter", "and", "light", "bends"]


def make_text(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def make_document(number: int, kind: str) -> Document:
    generator = np.random.default_rng([number, len(kind)])
    match kind:
        case "text":
            parts = (TextPart(make_text(generator, int(generator.integers(1, 40)))),)
        case "long":
            parts = (TextPart(make_text(generator, 250)),)
        case "image":
            side = int(generator.choice([20, 32, 50, 64]))
            pixels = generator.integers(0, 256, (side, 64, 3), np.uint8)
            parts = (TextPart("Image: "), ImagePart(pixels), TextPart(f" number {number}"))
        case "signal":
            samples = generator.normal(size=(int(generator.integers(30, 90)), int(generator.integers(1, 4)))).astype(np.float32)
            parts = (TextPart("Signal: "), SignalPart(samples, 10.0, "mV"), TextPart(f" number {number}"))
        case "both":
            signal, image = make_document(number, "signal"), make_document(number, "image")
            parts = (*signal.parts, *image.parts)
    return Document(parts, kind, "CC0-1.0", str(number), (kind,))


@pytest.fixture(scope="session")
def documents():
    kinds = ["text"] * 20 + ["image"] * 12 + ["signal"] * 12 + ["both"] * 4 + ["long"] * 2
    return [make_document(number, kind) for number, kind in enumerate(kinds)]


@pytest.fixture(scope="session")
def tokenizer():
    return ByteBpeTokenizer.train([" ".join(WORDS), "Image: Signal: number 0123456789"] * 3, 330)


@pytest.fixture(scope="session")
def model(tokenizer):
    text = TextConfig(vocab_size=336, hidden_size=32)
    return ModelConfig(
        text,
        VisionConfig(out_hidden_size=32),
        TimeSeriesConfig(out_hidden_size=32),
        **model_token_ids(tokenizer),
    )


@pytest.fixture(scope="session")
def encoder(tokenizer, model):
    return DocumentEncoder(tokenizer, model, PixelBounds(1024, 4096))


@pytest.fixture(scope="session")
def examples(documents, encoder):
    return [encoder.encode(document) for document in documents]


@pytest.fixture(scope="session")
def config():
    row = RowSize(128, patches=32, samples=700, signal_rows=240, signal_pairs=60, patch_width=6)
    return PipelineConfig(row, batch_size=4, seed=5, block=64)


KINDS = {"text": 150, "long": 8, "image": 60, "signal": 60}


@pytest.fixture(scope="session")
def directory(tmp_path_factory, encoder, config):
    """Prepared sources of every kind: documents, one to a record and many to a record, and packed rows."""
    root = tmp_path_factory.mktemp("prepared")
    encoder.tokenizer.save(root / "tokenizer.json")
    for kind, count in KINDS.items():
        made = [make_document(number, kind) for number in range(count)]
        write_documents(str(root / "documents" / kind), made, PreparationConfig("documents", config.row), encoder)
        write_documents(str(root / "chunks" / kind), made, PreparationConfig("documents", config.row, 300), encoder)
        write_documents(str(root / "rows" / kind), made, PreparationConfig("rows", config.row), encoder)
    return root


@pytest.fixture
def corpus(directory, config):
    """A mixture of them, by the name of their form."""

    def make(form="documents", kinds=("text", "long", "image", "signal"), **changes):
        weights = {"text": 0.4, "long": 0.1, "image": 0.3, "signal": 0.2}
        sources = [Source(f"{form}/{kind}", weights[kind]) for kind in kinds]
        return Corpus("tokenizer.json", sources, config, str(directory), **changes)

    return make
