"""Whatever is wrong with a checkpoint or the disk, the command names it before it writes anything."""

import json
import shutil

import numpy as np
import pytest

from interns1pro_jax.checkpoint.safetensors_io import INDEX, open_checkpoint
from tools import convert

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXPERT = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.language_model.norm.weight"


class Source:
    """A copy of a small FP8 checkpoint in two files, and ways to spoil it."""

    def __init__(self, reference, directory, write):
        self.directory, self._write = directory, write
        directory.mkdir()
        shutil.copy(reference / "tiny_fp8" / "config.json", directory)
        stored = open_checkpoint(reference / "tiny_fp8")
        self.tensors = {name: stored.read(name) for name in stored}
        self.write()

    def write(self):
        names = sorted(self.tensors)
        where = {name: FIRST if number < len(names) // 2 else SECOND for number, name in enumerate(names)}
        for file in (FIRST, SECOND):
            self._write(self.directory / file, {name: self.tensors[name] for name in names if where[name] == file})
        (self.directory / INDEX).write_text(json.dumps({"weight_map": where}))

    def change(self, name, function):
        self.tensors[name] = function(self.tensors[name].copy())
        self.write()

    def edit(self, file, function):
        content = json.loads((self.directory / file).read_text())
        function(content)
        (self.directory / file).write_text(json.dumps(content))


def with_nan(values):
    values.flat[3] = np.nan
    return values


CASES = {
    "unknown family": (
        lambda source: source.edit("config.json", lambda c: c.update(model_type="llama", architectures=["LlamaForCausalLM"])),
        "model_type='llama' is no family of models known here; these are: interns1_pro",
    ),
    "missing shard": (lambda source: (source.directory / SECOND).unlink(), f"{SECOND} cannot be read: No such file"),
    "mismatched index": (
        lambda source: source.edit(INDEX, lambda c: c["weight_map"].update({NORM: FIRST})),
        f"places tensor '{NORM}' in {FIRST}, but {SECOND} holds it",
    ),
    "tensors of another model": (
        lambda source: source.edit("config.json", lambda c: c["text_config"].update(num_hidden_layers=3)),
        "model.language_model.layers.2.input_layernorm.weight is missing",
    ),
    "NaN weight": (lambda source: source.change(NORM, with_nan), f"weights are NaN or infinite in {NORM}"),
    "NaN scale": (
        lambda source: source.change(EXPERT + "_scale_inv", with_nan),
        f"'{EXPERT}_scale_inv' has scales that are negative or not",
    ),
    "wrong scale shape": (
        lambda source: source.change(EXPERT + "_scale_inv", lambda scale: scale[:1]),
        f"{EXPERT}_scale_inv has shape [1, 2], but blocks of [128, 128] in [192, 256] ask for [2, 2]",
    ),
    "no scale": (
        lambda source: (source.tensors.pop(EXPERT + "_scale_inv"), source.write()),
        f"{EXPERT}_scale_inv is missing: {EXPERT} is stored as F8_E4M3 and needs it",
    ),
    "too little disk": (None, "more bytes and 1 are free; free some space, or choose another directory"),
}


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_the_command_names_it_and_writes_nothing(reference, tmp_path, write_safetensors, monkeypatch, capsys, case, to):
    spoil, message = CASES[case]
    source, target = Source(reference, tmp_path / "source", write_safetensors), tmp_path / "target"
    if spoil is None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    else:
        spoil(source)
    assert convert.main([str(source.directory), str(target), "--to", to]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error, error
    assert not target.exists() or not list(target.iterdir())
