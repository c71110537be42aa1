"""Packaging of interns1pro_jax: `pip install .` for the library, `.[media]` for files of videos and recordings, `.[demo]` for the demo's
data, `.[test]` for the tests."""

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "tensorstore>=0.1.80",
    "numpy>=2.0",
    "scipy>=1.13",
    "absl-py>=2.0",
    "gin-config>=0.5.0",
    "jaxtyping>=0.3",
    "msgpack>=1.0",
    "array_record>=0.8.1; platform_system == 'Linux'",
    "rich>=13",
    "tensorboardX>=2.6.4",
    "matplotlib>=3.9",
    "pillow>=11",
    "fsspec>=2025.3",
    "tokenizers>=0.22",
    "sentencepiece>=0.2.1",
    "regex>=2025.9",
    "jinja2>=3.1",
]

# Files of videos, sound, MiniSEED, EDF and BDF, and PhysioNet's records.
MEDIA = ["av>=14.0", "soundfile>=0.13", "pymseed>=1.0", "edfio>=0.4.10", "wfdb>=4.3"]

setup(
    name="interns1pro_jax",
    version="0.1.0",
    description="Intern-S1-Pro in JAX: the trillion-parameter scientific multimodal model, trained and served on TPU, GPU and CPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["interns1pro_jax*", "pallas_kernels*", "experiments*", "tools*"]),
    package_data={"interns1pro_jax": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda12]>=0.10.2"],
        "peers": ["tokamax>=0.0.17; python_version >= '3.12'"],  # shown beside our kernels in tools.kernel_report; wants JAX 0.11.1
        "demo": ["rdkit>=2025.9", "pymseed>=1.0"],
        "media": MEDIA,
        "data": ["pyarrow>=18"],
        "parity": ["torch>=2.6", "transformers>=5.0"],  # tests/checkpoint/test_families.py compares with it; 1.2 GB, a minute to install
        "gcs": ["gcsfs>=2025.3"],
        "s3": ["s3fs>=2025.3"],
        "test": [
            "pyarrow>=18",
            *MEDIA,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "safetensors>=0.6",
            "ruff>=0.12",
            "mypy>=1.15",
            "jax[tpu]>=0.10.2; platform_system == 'Linux' and platform_machine == 'x86_64'",  # compiles for TPUs that are not there
        ],
    },
)
