"""What the page shows is what the batch holds."""

import dataclasses

import matplotlib.image
import numpy as np

from interns1pro_jax.data.examples import StoredImage
from interns1pro_jax.data.media.images import read_image
from interns1pro_jax.data.packing import RowSize
from interns1pro_jax.data.pipeline import collate, row_of_examples
from tools.inspect_data import images_of, inspect, row_of_page, signals_of
from tools.recipe import Recipe


def test_pictures_and_signals_come_back_from_a_batch(examples, model):
    chosen = [e for e in examples if e.name.split(":")[0] in ("image", "signal")][:20:3]
    total = np.sum([e.size.as_array() for e in chosen], axis=0).tolist()
    row = RowSize(*total[:4], total[4], max(e.size.patch_width for e in chosen))
    batch = collate([row_of_examples(chosen, row.tokens, model)], row, model)
    media = [medium for example in chosen for medium in example.media]
    images = [medium for medium in media if isinstance(medium, StoredImage)]
    shown = images_of(batch.inputs.vision, 0, model)
    assert len(shown) == len(images) > 1
    for pixels, image in zip(shown, images, strict=True):
        original = read_image(image.content)
        if original.shape == pixels.shape:
            assert abs(pixels.astype(int) - original).max() <= 1
    assert any(read_image(image.content).shape == pixels.shape for pixels, image in zip(shown, images, strict=True))
    signals = [medium.signal() for medium in media if not isinstance(medium, StoredImage)]
    found = signals_of(batch.inputs.time_series, 0)
    assert len(found) == len(signals) > 1
    for samples, signal in zip(found, signals, strict=True):
        length = min(len(samples), len(signal.values))
        assert np.array_equal(samples[:length], signal.values[:length]) and samples.shape[1] == signal.values.shape[1]


def test_the_page_has_every_text_in_its_colour(corpus, model, tokenizer, tmp_path):
    recipe = Recipe(model, corpus(), tokenizer)
    page = inspect(recipe, tmp_path, step=0, steps=2, rows=4).read_text()
    assert page.count('class="row"') == 8 and "data:image/png" in page
    picture = matplotlib.image.imread(tmp_path / "batches.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    batches = recipe.corpus.batches(model, tokenizer, recipe.corpus.open_sources())
    batch = batches[0]
    shown = row_of_page(recipe, batch, 0)
    batches.close()
    assert shown in page
    assert shown.count('class="d"') == batch.inputs.segment_ids[0].max()
    learnt = tokenizer.decode(batch.labels[0][batch.labels[0] != -100].tolist())
    words = {word for word in learnt.replace("<|endoftext|>", " ").split() if word.isalpha()}
    assert words and all(word in shown for word in words)


def test_faults_are_on_the_page(corpus, model, tokenizer, tmp_path):
    whole = corpus("documents", kinds=("text", "signal"))
    row = dataclasses.replace(whole.pipeline.row, samples=100)
    whole = dataclasses.replace(whole, pipeline=dataclasses.replace(whole.pipeline, row=row, max_bad_share=1))
    page = inspect(Recipe(model, whole, tokenizer), tmp_path, step=0, steps=1, rows=1).read_text()
    assert "could not be used" in page and "too large for a row" in page
