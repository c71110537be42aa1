"""A small tokenizer, a small model's sizes, and documents of every kind."""

import numpy as np
import pytest

from interns1pro_jax.config import ModelConfig, TextConfig, TimeSeriesConfig, VisionConfig
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import PipelineConfig
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
def config():
    return PipelineConfig(RowSize(128, patches=32, samples=700, signal_rows=240, signal_pairs=60, patch_width=6), batch_size=4, seed=5)
