"""The data of a run, as a recipe names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data import paths
from interns1pro_jax.data.encoding import DocumentEncoder
from interns1pro_jax.data.examples import Example
from interns1pro_jax.data.image_processing import PixelBounds
from interns1pro_jax.data.mixture import CurriculumStage, Mixture, Source
from interns1pro_jax.data.pipeline import Batches, ReadConfig, RowReader
from interns1pro_jax.data.plan import PipelineConfig, make_plan
from interns1pro_jax.data.sources import ROWS, PreparedSource, check_fits, read_examples
from interns1pro_jax.tokenizer.base import Tokenizer
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A mixture of prepared sources, and held-out ones.

    Attributes:
      tokenizer: a directory of a release, or a `tokenizer.json`.
      sources: what is trained on.
      pipeline: sizes of rows and batches, and their order.
      directory: that the other paths start from: local, gs:// or s3://.
      curriculum: changes of the weights, by tokens seen.
      held_out: prepared sources of documents for evaluation, small enough for memory.
      bounds: how large images are, after resizing, when sources are prepared for this run.
      reading: threads and read-ahead.
      evaluation_batches: batches of held-out rows that an evaluation during training reads; the one at the end reads all.
      samples: held-out documents whose beginnings the report continues: with an image, with a signal and of text, in turn. A mesh
        that splits the sequence cannot generate, and writes none.
    """

    tokenizer: str
    sources: Sequence[Source]
    pipeline: PipelineConfig
    directory: str = ""
    curriculum: Sequence[CurriculumStage] = ()
    held_out: Sequence[str] = ()
    bounds: PixelBounds = dataclasses.field(default_factory=PixelBounds)
    reading: ReadConfig = dataclasses.field(default_factory=ReadConfig)
    evaluation_batches: int = 8
    samples: int = 8

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer: of a released directory, which must be local, or of a `tokenizer.json`.

        Raises:
          ConfigError: it cannot be read.
        """
        path = paths.join(self.directory, self.tokenizer)
        if Path(path).is_dir():
            return ScientificTokenizer.load(path)
        with paths.local_copy(path) as local:
            return ByteBpeTokenizer.load(local)

    def open_sources(self) -> list[PreparedSource]:
        """The prepared sources, in the order of their paths, as a `Mixture` has them.

        Raises:
          DataError: one is absent.
        """
        ordered = sorted(self.sources, key=lambda source: source.path)
        return [PreparedSource(paths.join(self.directory, source.path)) for source in ordered]

    def held_out_examples(self) -> dict[str, list[Example]]:
        """All held-out documents, by source.

        Raises:
          DataError: a source is absent or damaged.
          ConfigError: one holds packed rows.
        """
        return {path: list(read_examples(paths.join(self.directory, path))) for path in self.held_out}

    def batches(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        sources: Sequence[PreparedSource],
        ranks: int = 1,
        places: Int[np.ndarray, " local"] | None = None,
    ) -> Batches:
        """The batches of a run.

        Args:
          sources: of `open_sources`.
          ranks: data-parallel ranks, for balance.
          places: the rows of a batch that this process reads; default all.

        Raises:
          ConfigError, DataError: the sources do not fit together, or were prepared for something else.
        """
        if tokenizer.vocab_size > model.text.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids; TextConfig.vocab_size={model.text.vocab_size} must not be smaller."
            )
        check_fits(sources, tokenizer.fingerprint, model, self.pipeline.row)
        config = self.pipeline
        rows = bool(sources) and sources[0].manifest.kind == ROWS
        align = config.window * config.batch_size if rows else config.block
        ordered = sorted(self.sources, key=lambda source: source.path)
        mixture = Mixture(ordered, [prepared.size for prepared in sources], self.curriculum, config.seed, align)
        encoder = DocumentEncoder(tokenizer, model, self.bounds)
        prefixes = [
            encoder.system_prompt(source.system_prompt) if source.system_prompt else np.zeros(0, np.int32) for source in mixture.sources
        ]
        plan = make_plan(mixture, sources, config, ranks, [len(prefix) for prefix in prefixes])
        places = np.arange(config.batch_size) if places is None else places
        return Batches(RowReader(plan, places, model, prefixes), plan, self.reading)
