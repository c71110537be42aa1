"""Checks of the vision and the time-series tower."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from interns1pro_jax.models.time_series_inputs import PatchPlan, Signal, pack_time_series, required_sizes
from interns1pro_jax.models.vision_inputs import pack_vision
from tools.parity.golden import Golden
from tools.parity.media import split_items
from tools.parity.subject import Subject


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph: nnx.GraphDef, state: Any, inputs: Any):
    return nnx.merge(graph, state)(inputs, trace=True)


def check_vision(golden: Golden, subject: Subject) -> None:
    """Images and videos packed together: every stage of the tower."""
    config, tower = subject.config.vision, subject.model.vision
    if config is None or tower is None:
        golden.problem("the checkpoint's config has no vision_config")
        return
    items = split_items(golden.input("pixel_values"), golden.input("grid_thw" if "grid_thw" in golden else "image_grid_thw"))
    patches = sum(len(item.patches) for item in items)
    output, trace = jax.tree.map(np.asarray, _run(*nnx.split(tower), pack_vision([items], config)))
    golden.compare("output", output[0, : patches // config.spatial_merge_size**2])
    golden.compare("blocks", trace["blocks"][:, 0, :patches])
    for name, stage in (
        ("patch_embed", "patch_embed"), ("pos_embed", "pos_embed"), ("rotary_freqs", "rotary"), ("rotary_cos", "rotary_cos"),
        ("rotary_sin", "rotary_sin"), ("merger_norm", "merger_norm"),
    ):  # fmt: skip
        golden.compare(name, trace[stage][0, :patches])


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One signal at every stage of the tower."""

    subsampled: np.ndarray  # [pairs, 256]
    layers: np.ndarray  # [L, tokens, d_model]
    encoder: np.ndarray  # [tokens, adapt_out]
    output: np.ndarray  # [tokens, D]


def encode(subject: Subject, signals: Sequence[Signal]) -> list[Encoded]:
    """Encodes signals, those with patches of like length in one call: each must come out as if it were alone."""
    config, tower = subject.config.time_series, subject.model.time_series
    assert config is not None and tower is not None
    together: dict[int, list[int]] = defaultdict(list)
    for number, signal in enumerate(signals):
        together[required_sizes([[signal]]).bucketed().patch_width].append(number)
    encoded: dict[int, Encoded] = {}
    for numbers in together.values():
        pack = pack_time_series([[signals[number] for number in numbers]], config)
        output, trace = jax.tree.map(np.asarray, _run(*nnx.split(tower), pack))
        token = 0
        for number in numbers:
            plan = signals[number].plan
            at = slice(token, token + plan.tokens)
            encoded[number] = Encoded(
                subsampled=trace["subsampled"][0, 2 * token : 2 * token + plan.pairs],
                layers=trace["layers"][:, 0, at],
                encoder=trace["encoder"][0, at],
                output=output[0, at],
            )
            token += plan.tokens
    return [encoded[number] for number in range(len(signals))]


def check_time_series(golden: Golden, subject: Subject) -> None:
    """Cases `case<i>.<array>`, each a signal alone, and the table of their sizes."""
    if subject.config.time_series is None:
        golden.problem("the checkpoint's config has no ts_config")
        return
    cases = sorted({int(match[1]) for name in golden if (match := re.fullmatch(r"case(\d+)\.signal", name))})
    signals = [Signal(golden.input(f"case{i}.signal"), float(golden.input(f"case{i}.sampling_rate"))) for i in cases]
    for i, result in zip(cases, encode(subject, signals), strict=True):
        for field in dataclasses.fields(result):
            golden.compare(f"case{i}.{field.name}", getattr(result, field.name))
    golden.equal("table", [[*signal.values.shape, *_sizes(signal.plan).values()] for signal in signals])


def check_time_series_cases(golden: Golden, subject: Subject) -> None:
    """The same table in JSON: sizes that follow from length and sampling rate."""
    del subject
    for i in sorted({name.split("/")[0] for name in golden}, key=int):
        length, rate = int(golden.input(f"{i}/length")), float(golden.input(f"{i}/sampling_rate"))
        golden.get(f"{i}/channels")
        golden.equal(f"{i}/case", int(i))
        for name, value in _sizes(Signal(np.zeros(length), rate).plan).items():
            golden.equal(f"{i}/{name}", value)


def _sizes(plan: PatchPlan) -> dict[str, int]:
    return dict(stride=plan.stride, patch=plan.patch, num_patches=plan.patches, len_after_concat=plan.pairs, num_tokens=plan.tokens)


def check_time_series_batch(golden: Golden, subject: Subject) -> None:
    """Signals of different lengths in one call. Ours must equal the unbatched results `single<i>`; in the official batch the
    padding of a shorter signal leaks into its last tokens (spec 4.6), which are left out of `output`."""
    if subject.config.time_series is None:
        golden.problem("the checkpoint's config has no ts_config")
        return
    padded, lengths, rates = golden.input("signals"), golden.input("lengths"), golden.input("sampling_rate")
    signals = [
        Signal(row[:length], float(rate)) for row, length, rate in zip(padded, lengths, np.broadcast_to(rates, len(padded)), strict=True)
    ]
    results = encode(subject, signals)
    longest = max(signal.plan.pairs for signal in signals)
    golden.equal("subsampled_lengths", [signal.plan.pairs for signal in signals])
    used = np.arange(longest)[None, :, None] < np.array([signal.plan.pairs for signal in signals])[:, None, None]
    golden.compare("subsampled", _stack([result.subsampled for result in results], longest), where=used)
    tokens = max(signal.tokens for signal in signals)
    counts = np.zeros((len(signals), tokens, 1), bool)
    for i, (signal, result) in enumerate(zip(signals, results, strict=True)):
        golden.compare(f"single{i}", result.output)
        # Token t reads the pairs up to 2t + 2 through the two convolutions; after its last pair a padded row is not zero.
        reached = signal.tokens if signal.plan.pairs == longest else (signal.plan.pairs - 1) // 2
        counts[i, :reached] = True
        if reached < signal.tokens:
            golden.note(f"{signal.tokens - reached} token(s) of signal {i} with leaked padding are compared in single{i} only")
    golden.compare("output", _stack([result.output for result in results], tokens), where=counts)


def _stack(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Pads the first axis with zeros to `length` and stacks."""
    return np.stack([np.pad(a, ((0, length - len(a)), *((0, 0),) * (a.ndim - 1))) for a in arrays])
