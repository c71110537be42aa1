"""Every test runs on eight emulated CPU devices, so that sharded and unsharded results can be compared in one process.

The tests' programs are tiny and mostly compile time, so of XLA's code generation all is off that can be. Processes that tests start inherit
these flags.
"""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_prefer_vector_width=128"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # halves the time to compile; later ones do not know the flag
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

from pathlib import Path

import jax
import pytest

from interns1pro_jax.sharding import make_mesh

REFERENCE = Path(os.environ.get("INTERNS1PRO_REFERENCE", Path(__file__).resolve().parents[2] / "shared" / "reference"))


@pytest.fixture(scope="session")
def reference() -> Path:
    """The directory of golden data from the official implementation."""
    if not REFERENCE.is_dir():
        pytest.skip(f"golden data not found at {REFERENCE}; set INTERNS1PRO_REFERENCE to its directory")
    return REFERENCE


@pytest.fixture
def mesh():
    """A mesh of one device, in force during the test."""
    with jax.set_mesh(make_mesh()) as mesh:
        yield mesh
