"""The manifest of an expansion: which slot of which group in which layer is which expert of the source, and all else that decided it.

With the source it determines the grown checkpoint to the byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from interns1pro_jax.checkpoint.safetensors_writer import write_json
from interns1pro_jax.config import ConfigError
from interns1pro_jax.config_checks import check_fields, check_object, from_dict, load_json, reject_unknown, require
from interns1pro_jax.expansion.assignment import ExpansionConfig

FILE = "expansion.json"
_FORMAT = "interns1pro_jax expert expansion, 1"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Attributes:
    fingerprint: of the routing counts.
    tokens: that were counted.
    """

    fingerprint: str
    tokens: int

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """Attributes:
    source: fingerprint of the source (`expansion.checkpoint.fingerprint`).
    expansion: the method and its options.
    calibration: what the method measured; None where it measures nothing.
    layers: numbers of the MoE layers in the model.
    slots_LGS: source expert of each slot.
    """

    source: str
    expansion: ExpansionConfig
    calibration: Calibration | None
    layers: tuple[int, ...]
    slots_LGS: Int[np.ndarray, "L G S"]

    def to_json(self) -> dict[str, Any]:
        groups = {str(layer): slots_GS.tolist() for layer, slots_GS in zip(self.layers, self.slots_LGS, strict=True)}
        return {
            "format": _FORMAT,
            "source": self.source,
            "expansion": dataclasses.asdict(self.expansion),
            "calibration": None if self.calibration is None else dataclasses.asdict(self.calibration),
            "layers": groups,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads what `save` wrote.

        Raises:
          ConfigError: it is absent, or not a manifest.
        """
        content = load_json(path)
        try:
            return cls.from_json(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        keys = {"format", "source", "expansion", "calibration", "layers"}
        reject_unknown("manifest", content, keys)
        require(keys <= set(content), f"manifest: {sorted(keys - set(content))} are missing; it is damaged, expand again.")
        require(content["format"] == _FORMAT, f"manifest: format={content['format']!r} is not {_FORMAT!r}; expand again with this version.")
        check_object("layers", content["layers"])
        expansion = from_dict(ExpansionConfig, content["expansion"])
        calibration = None if content["calibration"] is None else from_dict(Calibration, content["calibration"])
        try:
            layers = tuple(int(layer) for layer in content["layers"])
            slots_LGS = np.array(list(content["layers"].values()))
        except ValueError as error:
            raise ConfigError(f"manifest: layers must be lists of slots, as many in every group ({error}); it is damaged.") from None
        require(
            slots_LGS.ndim == 3 and np.issubdtype(slots_LGS.dtype, np.integer) and slots_LGS.shape[1] == expansion.groups,
            f"manifest: layers must hold {expansion.groups} groups of expert ids each; it is damaged.",
        )
        return cls(str(content["source"]), expansion, calibration, layers, slots_LGS)

    def check(self, source: str, layers: tuple[int, ...], experts: int) -> None:
        """Raises `ConfigError` where the manifest is not one of this source: its fingerprint, MoE layers and experts."""
        require(
            self.source == source,
            f"the manifest is of another checkpoint ({self.source[:12]}, not {source[:12]}); give the one it was made with, or expand this "
            "one anew.",
        )
        expected = np.repeat(np.arange(experts), self.expansion.growth)
        shape = (len(layers), self.expansion.groups, len(expected) // self.expansion.groups)
        require(
            self.layers == layers and self.slots_LGS.shape == shape,
            f"the manifest has layers {self.layers} of {self.slots_LGS.shape[1:]} slots; the source has MoE layers {layers} of {experts} "
            "experts; it is damaged.",
        )
        wrong = [
            layer for layer, slots in zip(layers, self.slots_LGS, strict=True) if not np.array_equal(np.sort(slots, axis=None), expected)
        ]
        require(
            not wrong,
            f"the manifest does not hold each of {experts} experts {self.expansion.growth} times in layers {wrong[:8]}; it is damaged.",
        )
