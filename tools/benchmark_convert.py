"""Measures conversions of a large checkpoint on one host: seconds, bytes per second, and the memory that they held at their peak.

    python -m tools.benchmark_convert --workdir large --layers 20                # Qwen3-30B-A3B of 20 layers, 25 GB in bfloat16
    python -m tools.benchmark_convert --workdir large --layers 4 --keep

The source is made of sparse files, all zeros, which take no disk: what is measured is a conversion whose source is in memory. It goes into
a checkpoint of a run and from that into the released layout again, each of which takes the declared bytes of disk and is verified by its
checksums.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from interns1pro_jax.checkpoint.destination import MAX_FILE_BYTES
from interns1pro_jax.checkpoint.hf_names import hf_parameters
from interns1pro_jax.checkpoint.safetensors_writer import split_into_files, write_index, write_json
from interns1pro_jax.checkpoint.stored_tensors import tensor_specs, units_of
from interns1pro_jax.config import ModelConfig, TextConfig

QWEN3_30B = ModelConfig(
    text=TextConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, num_experts=128,
        num_experts_per_tok=8, router_n_groups=1, moe_intermediate_size=768, intermediate_size=6144, rope_theta=1e6, fope=None,
        max_position_embeddings=40960,
    ),
    vision=None,
    time_series=None,
    family="qwen3_moe",
)  # fmt: skip


def write_sparse(directory: Path, config: ModelConfig, max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, int]:
    """Makes a checkpoint of zeros in the released layout; its files take no disk. Returns the bytes of every tensor."""
    directory.mkdir(parents=True)
    tensors = tensor_specs(list(units_of(hf_parameters(config))), config, np.dtype(config.text.dtype), None)
    files = split_into_files(directory, tensors, max_file_bytes)
    for file in files:
        file.create()
        os.replace(file.partial, file.path)
    write_json(directory / "config.json", config.to_hf())
    write_index(directory, files)
    return {name: spec.nbytes for name, spec in tensors.items()}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmark_convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="directory to make")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="leave the result there")
    arguments = parser.parse_args()
    config = dataclasses.replace(QWEN3_30B, text=dataclasses.replace(QWEN3_30B.text, num_hidden_layers=arguments.layers))
    source, run, again = (arguments.workdir / name for name in ("source", "run", "again"))
    sizes = write_sparse(source, config)
    largest = max(sizes, key=lambda name: sizes[name])
    print(f"{len(sizes):,} tensors of {sum(sizes.values()) / 1e9:.2f} GB; the largest is {largest} of {sizes[largest] / 2**30:.2f} GiB")
    for command in (
        ["tools.convert", source, run, "--to", "orbax"],
        ["tools.inspect_checkpoint", run, "--verify"],
        ["tools.convert", run, again],
        ["tools.inspect_checkpoint", again, "--verify"],
    ):
        print("python -m", *command, flush=True)
        if (status := subprocess.run([sys.executable, "-m", *map(str, command)], check=False).returncode) != 0:
            return status
    if not arguments.keep:
        shutil.rmtree(arguments.workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
