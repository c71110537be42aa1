"""What the precautions of FP8 training are worth: small models trained with experts in FP8, and with one precaution left out.

    python -m tools.fp8_ablation --output docs/fp8            # fp8.json, fp8.png and the table on the console; minutes on a CPU
    python -m tools.fp8_ablation --steps 400 --seeds 5 --output runs/fp8

Every variant begins with the same weights and sees the same batches (text of Python's documented library) for each seed. The table has the
loss over the last quarter of the steps less that of bfloat16 with the same seed. Formats are emulated by rounding to them and back.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from interns1pro_jax.config import ModelConfig, TextConfig
from interns1pro_jax.layers.router import Router
from interns1pro_jax.models.inputs import Batch, ModelInputs
from interns1pro_jax.models.interns1pro import create_model
from interns1pro_jax.ops.expert_products import EXPERT_PRODUCTS, unfused
from interns1pro_jax.ops.grouped_matmul import grouped_matmul
from interns1pro_jax.ops.quantization import E4M3_MAX
from interns1pro_jax.optim.optimizer import OptimizerConfig, make_optimizer
from interns1pro_jax.optim.schedule import warmup_stable_decay
from interns1pro_jax.sharding import make_mesh
from interns1pro_jax.train.feed import place_batch
from interns1pro_jax.train.state import init_state
from interns1pro_jax.train.step import make_train_step

TEXT = TextConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16,
    num_experts_per_tok=8, router_n_groups=8, moe_intermediate_size=128, max_position_embeddings=128, rope_theta=1e4,
    initializer_range=0.06, dtype="bfloat16", param_dtype="float32",
)  # fmt: skip
ROWS, LENGTH = 8, 64
Quantize = Callable[[jax.Array], jax.Array]


def rounded(x: jax.Array, block: tuple[int, int] | None, power_of_two: bool = True, dtype: str = "float8_e4m3fn") -> jax.Array:
    """`x` [..., R, C] rounded to an FP8 format and back, with a scale for each block, or one for all where there is none."""
    largest = float(jnp.finfo(dtype).max) if dtype != "float8_e4m3fn" else E4M3_MAX
    x32 = x.astype(jnp.float32)
    if block is None:
        amax = jnp.max(jnp.abs(x32), keepdims=True)
    else:
        rows, columns = x.shape[-2] // block[0], x.shape[-1] // block[1]
        blocks = jnp.abs(x32).reshape(*x.shape[:-2], rows, block[0], columns, block[1])
        amax = jnp.broadcast_to(blocks.max((-3, -1), keepdims=True), blocks.shape).reshape(x.shape)
    scale = jnp.maximum(amax, 1e-30) / largest
    scale = jnp.exp2(jnp.ceil(jnp.log2(scale))) if power_of_two else scale
    return ((x32 / scale).astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


def product_of(rows: Quantize, matrices: Quantize, gradients: Quantize) -> Callable[..., jax.Array]:
    """A grouped product of numbers rounded by these functions, and its gradients straight through the rounding."""

    @jax.custom_vjp
    def product(lhs_MK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return grouped_matmul(rows(lhs_MK), matrices(rhs_GKN), sizes_G)

    def forward(lhs_MK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array):  # type: ignore[no-untyped-def]
        out, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_G), rows(lhs_MK), matrices(rhs_GKN))
        return out, pullback

    product.defvjp(forward, lambda pullback, grad_MN: (*pullback(gradients(grad_MN)), None))
    return lambda lhs, rhs, sizes, *, group_offset=None: product(lhs, rhs, sizes)


def tile(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128))


def block(x: jax.Array) -> jax.Array:
    return rounded(x.astype(jnp.bfloat16), (128, 128)).astype(x.dtype)


def whole(x: jax.Array) -> jax.Array:
    return rounded(x, None)


def unscaled(x: jax.Array) -> jax.Array:
    return x.astype("float8_e4m3fn").astype(x.dtype)


def e5m2_gradient(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128), dtype="float8_e5m2")


def free_tile(x: jax.Array) -> jax.Array:
    return rounded(x, (1, 128), power_of_two=False)


def free_block(x: jax.Array) -> jax.Array:
    return rounded(x, (128, 128), power_of_two=False)


@contextlib.contextmanager
def router_in_fp8() -> Iterator[None]:
    """Routers whose inputs and weights are rounded to e4m3."""
    exact = Router.logits

    def logits(self: Router, x_BTD: jax.Array) -> jax.Array:
        return exact(self, x_BTD + jax.lax.stop_gradient(whole(x_BTD.astype(jnp.float32)).astype(x_BTD.dtype) - x_BTD))

    with mock.patch.object(Router, "logits", logits):
        yield


@contextlib.contextmanager
def attention_in_fp8() -> Iterator[None]:
    """Everything else in FP8, too: the inputs of all projections."""
    from interns1pro_jax.ops import projection

    exact = projection.project

    def project(formula, x_BT, weight, precision=None):  # type: ignore[no-untyped-def]
        near = whole(x_BT.astype(jnp.float32)).astype(x_BT.dtype)
        return exact(formula, x_BT + jax.lax.stop_gradient(near - x_BT), weight, precision)

    with mock.patch.object(projection, "project", project):
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


def batch(data: np.ndarray, seed: int, step: int) -> Any:
    starts = np.random.default_rng([seed, step]).integers(0, len(data) - LENGTH - 1, ROWS)
    rows: Any = np.stack([data[start : start + LENGTH + 1] for start in starts]).astype(np.int32)
    positions: Any = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(ModelInputs(rows[:, :-1], positions, positions * 0 + 1), rows[:, 1:])


def train(variant: Variant, data: np.ndarray, seeds: int, steps: int) -> np.ndarray:
    """Losses [seeds, steps]."""
    config = ModelConfig(dataclasses.replace(TEXT, expert_products=variant.products), None, None)
    products = {} if variant.product is None else {"fp8": unfused(variant.product)}
    optimizer = make_optimizer(OptimizerConfig(), warmup_stable_decay(3e-3, steps, warmup_steps=max(steps // 20, 1)))
    losses = np.zeros((seeds, steps))
    with mock.patch.dict(EXPERT_PRODUCTS, products), variant.around(), jax.set_mesh(make_mesh()):  # type: ignore[arg-type]
        step_fn = None
        for seed in range(seeds):
            graph, state = init_state(create_model(config, seed), optimizer)
            step_fn = step_fn or make_train_step(graph, config.text, optimizer)
            for step in range(steps):
                state, metrics = step_fn(state, place_batch(batch(data, seed, step)))
                losses[seed, step] = float(metrics["loss"])
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fp8_ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for fp8.json and fp8.png")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    console, data = Console(), corpus()
    losses = {v.name: train(v, data, arguments.seeds, arguments.steps) for v in track(VARIANTS, "training", console=console)}
    lines = table(losses)
    content = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "steps": arguments.steps,
        "losses": {name: np.round(x, 5).tolist() for name, x in losses.items()},
    }
    (arguments.output / "fp8.json").write_text(json.dumps(content))
    draw(losses).savefig(arguments.output / "fp8.png", dpi=120)
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def table(losses: dict[str, np.ndarray]) -> list[str]:
    """Markdown: mean loss at the end, and its difference from bfloat16 with the same seed, mean and extremes over seeds."""
    late = {name: x[:, -max(x.shape[1] // 4, 1) :].mean(1) for name, x in losses.items()}
    noise = float(np.std(late["bfloat16"], ddof=1)) if len(late["bfloat16"]) > 1 else float("nan")
    lines = ["| experts | loss at the end | less that of bfloat16, same seed | least to most |", "| --- | ---: | ---: | ---: |"]
    for name, x in late.items():
        change = x - late["bfloat16"]
        lines.append(f"| {name} | {x.mean():.4f} | {change.mean():+.4f} | {change.min():+.4f} to {change.max():+.4f} |")
    return [*lines, "", f"Standard deviation of bfloat16 over seeds: {noise:.4f}."]


def draw(losses: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss less that of bfloat16 (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    width = max(losses["bfloat16"].shape[1] // 20, 1)
    kernel = np.ones(width) / width
    for number, (name, x) in enumerate(losses.items()):
        if name == "bfloat16":
            axes.axhline(0, color="0.5", linewidth=0.8, label=name)
            continue
        change = np.stack([np.convolve(row, kernel, "valid") for row in x - losses["bfloat16"]])
        steps = np.arange(change.shape[1]) + width
        axes.plot(steps, change.mean(0), color=f"C{number}", label=name)
        axes.fill_between(steps, change.min(0), change.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set_yscale("symlog", linthresh=0.02)
    axes.legend(edgecolor="none", fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    main()
