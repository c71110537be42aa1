"""What a run is made of: written to its journal at every start."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from interns1pro_jax.train.report import environment

_DIFF_BYTES = 200_000  # of changes that are not committed; more are only named by their hash


def run_manifest(config: str, identity: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """JSON for `Journal.manifest`.

    Args:
      config: the configuration as it is used.
      identity: what the checkpoints hold the run to.
      data: fingerprints of the prepared sources, by path.
    """
    mesh = jax.sharding.get_mesh()
    return {
        "command": sys.argv,
        "config": config,
        "identity": identity,
        "data": data,
        "environment": environment(),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": git_state(Path(__file__).resolve().parents[1]),
    }


def git_state(directory: Path) -> dict[str, Any]:
    """Commit and uncommitted changes of the code in `directory`; empty where it is in no repository, or there is no git."""
    try:
        commit = _git(directory, "rev-parse", "HEAD").strip()
        changed = _git(directory, "status", "--porcelain").splitlines()
        difference = _git(directory, "diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return {}
    state: dict[str, Any] = {"commit": commit, "changed": changed}
    if difference:
        state["diff_sha256"] = hashlib.sha256(difference.encode()).hexdigest()
        if len(difference) <= _DIFF_BYTES:
            state["diff"] = difference
    return state


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, encoding="utf-8", errors="replace", check=True
    ).stdout
