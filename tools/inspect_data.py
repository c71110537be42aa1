"""Shows the first batches of a recipe, to be looked at before a run:

    python -m tools.inspect_data configs/recipes/demo.gin --output inspection [--step 0] [--steps 2]

`inspection/page.html` has the text of every document of the batches, decoded, in the colour of its segment, learnt tokens bold; its
images and signals; and `inspection/batches.png`: the packing of each row, where its labels are, and the shares of the sources.
"""

from __future__ import annotations

import argparse
import html
import io
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from interns1pro_jax.config import ConfigError, ModelConfig
from interns1pro_jax.data.pipeline import Batches
from interns1pro_jax.data.records import DataError
from interns1pro_jax.models.inputs import Batch, TimeSeriesInputs, VisionInputs
from interns1pro_jax.ops.losses import IGNORED
from tools.recipe import Recipe, read_recipe

_DRAWS = 10_000  # that the shares are counted over
_STYLE = """
body { font: 14px/1.45 sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
h2 { margin: 1.6em 0 .3em }
.row { border: 1px solid #ccc; padding: .5em; margin: .6em 0 }
.d { white-space: pre-wrap; padding: 1px 3px; border-radius: 3px; font: 12px monospace }
.d i { font-style: normal; opacity: .55 }
img { max-width: 100%; margin: 3px; image-rendering: pixelated; vertical-align: top }
small { color: #666 }
"""


def colours(count: int) -> list[tuple[float, float, float]]:
    """Light colours that differ from their neighbours."""
    wheel = matplotlib.colormaps["Set3"](np.arange(12))[:, :3]
    return [tuple(wheel[number % 12].tolist()) for number in range(count)]


def images_of(vision: VisionInputs, row: int, model: ModelConfig) -> list[np.ndarray]:
    """The pictures of a row, put together again from their patches; of a video its frames."""
    assert model.vision is not None
    config, found = model.vision, []
    frame_ids = np.asarray(vision.frame_ids[row])
    for frame in range(1, int(frame_ids.max(initial=0)) + 1):
        mine = frame_ids == frame
        patches, places = np.asarray(vision.patches[row])[mine], np.asarray(vision.row_col[row])[mine]
        side = config.patch_size
        height, width = (places.max(0) + 1) * side
        picture = np.zeros((height, width, config.in_channels), np.float32)
        blocks = patches.reshape(-1, config.in_channels, config.temporal_patch_size, side, side)[:, :, 0]
        for (y, x), block in zip(places.tolist(), blocks, strict=True):
            picture[y * side : (y + 1) * side, x * side : (x + 1) * side] = block.transpose(1, 2, 0)
        found.append(np.clip(picture * 127.5 + 127.5, 0, 255).astype(np.uint8))
    return found


def signals_of(series: TimeSeriesInputs, row: int) -> list[np.ndarray]:
    """The samples of each signal of a row, [length, channels], as the tower gets them."""
    pairs, weights = np.asarray(series.pair_ids[row]), np.asarray(series.row_weight[row])
    patch, start, length = (np.asarray(getattr(series, name)[row]) for name in ("row_patch", "row_start", "row_length"))
    found = []
    for number in range(1, int(pairs.max(initial=0)) + 1):
        places = np.flatnonzero(pairs == number)
        rows = (length > 0) & (patch // 2 >= places[0]) & (patch // 2 <= places[-1])
        channels = round(1 / float(weights[rows][0]))
        begin, end = int(start[rows].min()), int((start + length)[rows].max())
        found.append(np.asarray(series.values[row])[begin:end].reshape(-1, channels))
    return found


def packing_map(axes: Axes, batch: Batch, step: int, rows: int) -> None:
    """A line for each row: its segments in colours, white where it is padded, a dark line below what is learnt."""
    segments, labels = np.asarray(batch.inputs.segment_ids)[:rows], np.asarray(batch.labels)[:rows]
    wheel = np.array([(1, 1, 1), *colours(max(int(segments.max()), 1))])
    picture = np.repeat(wheel[segments], 4, axis=0)
    picture[3::4][labels != IGNORED] = 0.25
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, segments.shape[1], len(segments) - 0.5, -0.5))
    full = float((np.asarray(batch.inputs.segment_ids) > 0).mean())
    learnt = float((np.asarray(batch.labels) != IGNORED).mean())
    axes.set_title(
        f"batch {step}: {full:.1%} filled, {learnt:.1%} learnt, {int(np.asarray(batch.inputs.segment_ids).max(1).sum())} documents"
    )
    axes.set_xlabel("token")
    axes.set_ylabel("row")


def shares(axes: Axes, batches: Batches, step: int) -> None:
    """Tokens of the sources among the draws from the first batch on, beside what the weights ask for."""
    plan = batches.plan
    mixture = plan.mixture
    draws = mixture.draws(0, _DRAWS)
    per_record = np.array([size.tokens / size.records for size in mixture.sizes])
    tokens = np.bincount(draws.source, minlength=len(per_record)) * per_record
    seen = Counter(piece.source for row in plan.batch(step) for piece in row.pieces)
    places = np.arange(len(per_record))
    wanted = np.array(mixture.stages[0].rates) * per_record
    axes.barh(places - 0.2, wanted / wanted.sum(), 0.38, color="#bbb", label="wanted, of tokens")
    axes.barh(places + 0.2, tokens / tokens.sum(), 0.38, color="#4a7ab5", label=f"first {_DRAWS:,} draws")
    names = [f"{source.path} [{source.modality}, {source.domain}]" for source in mixture.sources]
    axes.set_yticks(places, [f"{name}: {seen[number]} in batch {step}" for number, name in enumerate(names)])
    axes.invert_yaxis()
    axes.legend()
    axes.set_title("shares of the sources")


def draw(shown: Sequence[tuple[int, Batch]], batches: Batches, rows: int, path: Path) -> None:
    """The picture: packing of each batch, and the shares."""
    heights = [0.28 * min(rows, len(batch.labels)) + 0.9 for _, batch in shown] + [0.42 * len(batches.plan.mixture.sources) + 0.8]
    figure, axes = plt.subplots(len(heights), 1, figsize=(12, sum(heights) + 0.5), height_ratios=heights, layout="constrained")
    for place, (step, batch) in zip(axes, shown, strict=False):
        packing_map(place, batch, step, rows)
    shares(axes[-1], batches, shown[0][0])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def signal_picture(samples: np.ndarray) -> Image.Image:
    figure, axes = plt.subplots(figsize=(3.4, 1.1), layout="constrained")
    axes.plot(samples, linewidth=0.7)
    axes.tick_params(labelsize=6)
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return Image.open(file)


def document(recipe: Recipe, ids: np.ndarray, learnt: np.ndarray, colour: tuple[float, float, float]) -> str:
    """The text of a document: runs of learnt tokens bold, others pale; runs of placeholders as their number."""
    silent = {recipe.model.image_token_id, recipe.model.video_token_id, recipe.model.ts_token_id}
    parts, start = [], 0
    kinds = [("*", int(token)) if token in silent else ("b" if is_learnt else "i", 0) for token, is_learnt in zip(ids, learnt, strict=True)]
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or kinds[stop] != kinds[start]:
            kind, _ = kinds[start]
            text = recipe.tokenizer.decode(ids[start:stop].tolist() if kind != "*" else [int(ids[start])])
            text = f"{text} x {stop - start}" if kind == "*" else text
            parts.append(f"<{kind}>{html.escape(text)}</{kind}>" if kind != "*" else f"<i>{html.escape(text)}</i>")
            start = stop
    return f'<span class="d" style="background: {matplotlib.colors.to_hex(colour)}">{"".join(parts)}</span>'


def row_of_page(recipe: Recipe, batch: Batch, row: int) -> str:
    """A row of a batch: its documents, pictures and signals."""
    ids, segments = np.asarray(batch.inputs.tokens[row]), np.asarray(batch.inputs.segment_ids[row])
    learnt = np.concatenate([[False], np.asarray(batch.labels[row])[:-1] != IGNORED])
    count = int(segments.max())
    wheel = colours(count)
    text = "<br>".join(document(recipe, ids[segments == n], learnt[segments == n], wheel[n - 1]) for n in range(1, count + 1))
    pictures = []
    if batch.inputs.vision is not None:
        pictures += [Image.fromarray(pixels) for pixels in images_of(batch.inputs.vision, row, recipe.model)]
    if batch.inputs.time_series is not None:
        pictures += [signal_picture(samples) for samples in signals_of(batch.inputs.time_series, row)]
    shown = "".join(f'<img src="data:image/png;base64,{_png(picture)}" title="{picture.width} x {picture.height}">' for picture in pictures)
    padding = int((segments == 0).sum())
    return f'<div class="row"><small>row {row}: {count} documents, {padding} tokens of padding</small><br>{text}<br>{shown}</div>'


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return b64encode(file.getvalue()).decode()


def inspect(recipe: Recipe, output: Path, step: int, steps: int, rows: int) -> Path:
    """Writes the page; returns its path."""
    batches = recipe.corpus.batches(recipe.model, recipe.tokenizer, recipe.corpus.open_sources())
    shown = [(number, batches[number]) for number in range(step, step + steps)]
    output.mkdir(parents=True, exist_ok=True)
    draw(shown, batches, rows, output / "batches.png")
    faults = "".join(f"<li>{html.escape(f'{fault.name}: {fault.detail}')}</li>" for fault in batches.quarantine.faults.values())
    body = ['<h1>First batches</h1><p>Learnt tokens are bold; each document has its colour.</p><img src="batches.png">']
    body.append(f"<h2>Records that could not be used</h2><ul>{faults}</ul>" if faults else "")
    for number, batch in shown:
        body.append(f"<h2>batch {number}</h2>")
        body += [row_of_page(recipe, batch, row) for row in range(min(rows, len(batch.labels)))]
    batches.close()
    page = output / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><title>batches</title><style>{_STYLE}</style>{"".join(body)}')
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="gin file")
    parser.add_argument("--gin_param", action="append", default=[], help="binding that overrides the recipe")
    parser.add_argument("--output", type=Path, default=Path("inspection"), help="directory for the page")
    parser.add_argument("--step", type=int, default=0, help="first batch to show")
    parser.add_argument("--steps", type=int, default=2, help="batches to show")
    parser.add_argument("--rows", type=int, default=8, help="rows of each batch to show")
    arguments = parser.parse_args(argv)
    try:
        recipe = read_recipe([arguments.recipe], arguments.gin_param)
        page = inspect(recipe, arguments.output, arguments.step, arguments.steps, arguments.rows)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    Console(highlight=False).print(f"{page} and {page.with_name('batches.png')}")


if __name__ == "__main__":
    main()
