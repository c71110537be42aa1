"""What the precautions of FP8 training are worth: small models trained with experts in FP8, and with one precaution left out.

    python -m tools.fp8_ablation --output runs/fp8     # minutes on a CPU
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m tools.fp8_ablation --output docs/fp8 --steps 400 --seeds 5 --processes 4     # on a GPU

writes fp8.json and fp8.png, and the table to the console. Every variant begins with the same weights and sees the same batches (source
text of Python's library) for each seed. For each the table has

* the loss over the last quarter of the steps less that of bfloat16 with the same seed,
* the distance of the experts' gradients from those of a model in float32, relative to these, at the same weights (of the first seed's
  bfloat16 model, trained) and for the same batches,
* the share of choices of experts, there, that are not those of the model in float32.

Formats are emulated by rounding to them and back, but for the recipe itself, which is the library's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import multiprocessing
import pkgutil
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from interns1pro_jax import sharding
from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.layers import attention
from interns1pro_jax.layers.router import Router
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.ops import projection
from interns1pro_jax.ops.expert_products import EXPERT_PRODUCTS, unfused
from interns1pro_jax.ops.grouped_matmul import grouped_matmul
from interns1pro_jax.ops.quantization import E4M3_MAX, round_to_e4m3
from interns1pro_jax.optim.groups import path_name
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import warmup_stable_decay
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.objective import loss_function
from interns1pro_jax.train.state import TrainState, init_state
from interns1pro_jax.train.step import make_train_step

TEXT = TextConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16,
    num_experts_per_tok=8, router_n_groups=8, moe_intermediate_size=128, max_position_embeddings=128, rope_theta=1e4,
    initializer_range=0.06, dtype="bfloat16", param_dtype="float32",
)  # fmt: skip
ROWS, LENGTH = 8, 64
PROBES = 4  # batches for which gradients are compared
POINTS = 40  # of a curve in the file
Quantize = Callable[[jax.Array], jax.Array]


def round_to_e5m2(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=2)


def rounded(
    x: jax.Array, block: tuple[int, int] | None, power_of_two: bool = True, to: Quantize = round_to_e4m3, largest: float = E4M3_MAX
) -> jax.Array:
    """`x` [..., R, C] rounded to an FP8 format and back, with a scale for each block, or one for all where there is none."""
    x32 = x.astype(jnp.float32)
    if block is None:
        amax = jnp.max(jnp.abs(x32), keepdims=True)
    else:
        rows, columns = x.shape[-2] // block[0], x.shape[-1] // block[1]
        blocks = jnp.abs(x32).reshape(*x.shape[:-2], rows, block[0], columns, block[1])
        amax = jnp.broadcast_to(blocks.max((-3, -1), keepdims=True), blocks.shape).reshape(x.shape)
    scale = jnp.maximum(amax, 1e-30) / largest
    scale = jnp.exp2(jnp.ceil(jnp.log2(scale))) if power_of_two else scale
    return (to(jnp.clip(x32 / scale, -largest, largest)) * scale).astype(x.dtype)


def product_of(rows: Quantize, matrices: Quantize, gradients: Quantize) -> Callable[..., jax.Array]:
    """A grouped product of numbers rounded by these functions, and its gradients straight through the rounding."""

    @jax.custom_vjp
    def product(lhs_MK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return grouped_matmul(rows(lhs_MK), matrices(rhs_GKN), sizes_G)

    def forward(lhs_MK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array):  # type: ignore[no-untyped-def]
        out, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_G), rows(lhs_MK), matrices(rhs_GKN))
        return out, pullback

    product.defvjp(forward, lambda pullback, grad_MN: (*pullback(gradients(grad_MN)), None))

    def grouped(lhs: jax.Array, rhs: jax.Array, sizes_G: jax.Array, *, transposed: bool = False, group_offset: None = None) -> jax.Array:
        return product(lhs, jnp.swapaxes(rhs, 1, 2) if transposed else rhs, sizes_G)

    return grouped


def tile(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128))


def block(x: jax.Array) -> jax.Array:
    return rounded(x.astype(jnp.bfloat16), (128, 128)).astype(x.dtype)


def whole(x: jax.Array) -> jax.Array:
    return rounded(x, None)


def unscaled(x: jax.Array) -> jax.Array:
    return round_to_e4m3(jnp.clip(x.astype(jnp.float32), -E4M3_MAX, E4M3_MAX)).astype(x.dtype)


def e5m2_gradient(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128), to=round_to_e5m2, largest=57344.0)


def free_tile(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128), power_of_two=False)


def free_block(x: jax.Array) -> jax.Array:
    return rounded(x, (128, 128), power_of_two=False)


def near(x: jax.Array) -> jax.Array:
    """`x` rounded to e4m3 with one scale; its gradient passes straight through."""
    return x + jax.lax.stop_gradient(whole(x.astype(jnp.float32)).astype(x.dtype) - x)


@contextlib.contextmanager
def router_in_fp8() -> Iterator[None]:
    """Routers whose inputs and weights are rounded to e4m3."""

    def logits(self: Router, x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
        return projection.project("btd,de->bte", near(x_BTD.astype(jnp.float32)), near(kernel), float32=True)

    with mock.patch.object(Router, "logits", logits):
        yield


@contextlib.contextmanager
def attention_in_fp8() -> Iterator[None]:
    """Attention whose projections have inputs and weights rounded to e4m3."""
    exact = attention.projection.project

    def project(formula: str, x_BT: jax.Array, weight: jax.Array, *rest: Any) -> jax.Array:
        return exact(formula, near(x_BT), near(weight), *rest)

    with mock.patch.object(attention, "projection", types.SimpleNamespace(project=project, gathered=attention.projection.gathered)):
        yield


@dataclasses.dataclass(frozen=True)
class Variant:
    """How experts multiply (None: as the model says), and what else is changed."""

    name: str
    product: Callable[..., jax.Array] | None = None
    products: str = "fp8"
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


VARIANTS = (
    Variant("bfloat16", products="dtype"),
    Variant("the recipe"),
    Variant("scales not powers of two", product_of(free_tile, free_block, free_tile)),
    Variant("one scale per tensor", product_of(whole, whole, whole)),
    Variant("no scales", product_of(unscaled, unscaled, unscaled)),
    Variant("gradients in e5m2", product_of(tile, block, e5m2_gradient)),
    Variant("router in fp8, too", around=router_in_fp8),
    Variant("attention in fp8, too", around=attention_in_fp8),
)


def corpus() -> np.ndarray:
    """Bytes of the source of Python's library that is prose most: the modules of text processing and mathematics."""
    import statistics
    import textwrap

    roots = [Path(module.__file__ or "").parent for module in (statistics, textwrap)]
    names = sorted({info.name for info in pkgutil.iter_modules([str(roots[0])]) if not info.ispkg})[:60]
    text = b"".join((roots[0] / f"{name}.py").read_bytes() for name in names if (roots[0] / f"{name}.py").exists())
    return np.frombuffer(text, np.uint8)


def rows(data: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Tokens [ROWS, LENGTH + 1] of a batch."""
    starts = np.random.default_rng([seed, step]).integers(0, len(data) - LENGTH - 1, ROWS)
    return np.stack([data[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


def batch_of(rows: jax.Array) -> Batch:
    rows = sharding.constrain(rows, "batch", None)
    positions = jnp.zeros_like(rows[:, 1:]) + jnp.arange(LENGTH, dtype=jnp.int32)
    return Batch(ModelInputs(rows[:, :-1], positions, jnp.ones_like(positions)), rows[:, 1:])


@contextlib.contextmanager
def applied(variant: Variant, dtype: str = "bfloat16") -> Iterator[ModelConfig]:
    """The model of a variant, whose products are in force while it is entered."""
    products: Any = {} if variant.product is None else {"fp8": unfused(variant.product)}
    text = dataclasses.replace(TEXT, expert_products=variant.products, dtype=dtype)
    with mock.patch.dict(EXPERT_PRODUCTS, products), variant.around(), jax.set_mesh(make_mesh()):
        yield ModelConfig(text, None, None)


def train(variant: Variant, data: np.ndarray, seeds: int, steps: int) -> tuple[np.ndarray, TrainState]:
    """Losses [seeds, steps], and the first seed's state at the end; one program does all steps."""
    optimizer = make_optimizer(OptimizerConfig(), warmup_stable_decay(3e-3, steps, warmup_steps=max(steps // 20, 1)))
    losses, ends = np.zeros((seeds, steps)), []
    with applied(variant) as config:
        states = [init_state(create_model(config, seed), optimizer) for seed in range(seeds)]
        one = make_train_step(states[0][0], config.text, optimizer)

        def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
            state, metrics = one(state, batch_of(rows))
            return state, metrics["loss"]

        many = jax.jit(lambda state, rows: jax.lax.scan(step, state, rows))
        for seed, (_, state) in enumerate(states):
            state, losses[seed] = many(state, np.stack([rows(data, seed, number) for number in range(steps)]))
            ends.append(state)
    return losses, ends[0]


def compare(data: np.ndarray, steps: int) -> dict[str, tuple[float, float]]:
    """Of every variant: the relative distance of the experts' gradients from those of float32, and the share of other choices."""
    _, state = train(VARIANTS[0], data, 1, steps)
    batches = [rows(data, 0, steps + number) for number in range(PROBES)]

    def found(variant: Variant, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        with applied(variant, dtype) as config:
            graph = nnx.graphdef(create_model(config))

            @jax.jit
            def gradient(params: Any, buffers: Any, rows: jax.Array) -> tuple[list[jax.Array], jax.Array]:
                batch = batch_of(rows)
                grads = jax.grad(lambda params: loss_function(nnx.merge(graph, params, buffers), batch)[0])(params)
                experts = [x for path, x in jax.tree_util.tree_leaves_with_path(grads) if path_name(path).endswith(("wi_EDF", "wo_EFD"))]
                return experts, nnx.merge(graph, params, buffers)(batch.inputs).routing_LBTGC

            results = [gradient(state.params, state.buffers, rows) for rows in batches]
            return np.stack([np.concatenate([np.ravel(x) for x in grads]) for grads, _ in results]), np.stack([r for _, r in results])

    exact, choices = found(VARIANTS[0], "float32")
    result = {}
    for variant in VARIANTS:
        grads, chosen = found(variant, "bfloat16")
        result[variant.name] = float(np.linalg.norm(grads - exact) / np.linalg.norm(exact)), float(np.mean(chosen != choices))
    return result


def losses_of(number: int, seeds: int, steps: int) -> np.ndarray:
    """For a process of its own, to which functions cannot be sent."""
    return train(VARIANTS[number], corpus(), seeds, steps)[0]


def compared(steps: int) -> dict[str, tuple[float, float]]:
    return compare(corpus(), steps)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fp8_ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for fp8.json and fp8.png")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="variants that are trained at the same time, on the same device")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    console, width = Console(), max(arguments.steps // POINTS, 1)
    content: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    content |= {"steps": arguments.steps, "losses": {}}
    file = arguments.output / "fp8.json"
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        comparison = pool.submit(compared, arguments.steps)
        numbers = range(len(VARIANTS))
        found = pool.map(functools.partial(losses_of, seeds=arguments.seeds, steps=arguments.steps), numbers)
        for variant, losses in track(zip(VARIANTS, found, strict=True), "training", len(VARIANTS), console=console):
            content["losses"][variant.name] = np.round(means(losses, width), 5).tolist()
            file.write_text(json.dumps(content))
        content["gradients"] = comparison.result()
    content["table"] = table(content)
    file.write_text(json.dumps(content))
    draw(content).savefig(arguments.output / "fp8.png", dpi=120)
    console.print("\n".join(content["table"]), highlight=False, soft_wrap=True)


def means(x: np.ndarray, width: int) -> np.ndarray:
    """Over `width` steps at a time [seeds, points]."""
    return x[:, : x.shape[1] // width * width].reshape(len(x), -1, width).mean(2)


def table(content: dict[str, Any]) -> list[str]:
    """Markdown: mean loss at the end, its difference from bfloat16 with the same seed (mean and extremes over seeds), and `compare`."""
    late = {name: last_quarter(np.array(losses)) for name, losses in content["losses"].items()}
    noise = float(np.std(late["bfloat16"], ddof=1)) if len(late["bfloat16"]) > 1 else float("nan")
    lines = [
        "| experts | loss at the end | less that of bfloat16, same seed | least to most | gradients off by | other choices |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, x in late.items():
        change, (off, other) = x - late["bfloat16"], content["gradients"][name]
        of_seeds = f"{change.mean():+.4f} | {change.min():+.4f} to {change.max():+.4f}"
        lines.append(f"| {name} | {x.mean():.4f} | {of_seeds} | {100 * off:.1f} % | {100 * other:.1f} % |")
    return [*lines, "", f"Standard deviation of bfloat16 over seeds: {noise:.4f}."]


def last_quarter(losses: np.ndarray) -> np.ndarray:
    """Mean of each seed."""
    return losses[:, -max(losses.shape[1] // 4, 1) :].mean(1)


def draw(content: dict[str, Any]) -> Figure:
    """Differences from bfloat16 with the same seed: mean and extremes over seeds."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss less that of bfloat16 (nats per byte)")
    axes.set_title(f"{content['date']}, JAX {content['jax']}, {content['device']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    exact = np.array(content["losses"]["bfloat16"])
    steps = (np.arange(exact.shape[1]) + 1) * content["steps"] / exact.shape[1]
    for number, (name, losses) in enumerate(content["losses"].items()):
        if name == "bfloat16":
            axes.axhline(0, color="0.5", linewidth=0.8, label=name)
            continue
        change = np.array(losses) - exact
        axes.plot(steps, change.mean(0), color=f"C{number}", label=name)
        axes.fill_between(steps, change.min(0), change.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_yscale("symlog", linthresh=0.02)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(edgecolor="none", fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    main()
