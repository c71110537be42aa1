"""The released tokenizer, and the plain rules to compare it with; random texts and conversations."""

import random

import pytest

from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from tools.tokenizers.slow import SlowTokenizer


@pytest.fixture(scope="session")
def released(reference) -> ScientificTokenizer:
    return ScientificTokenizer.load(reference / "official")


@pytest.fixture(scope="session")
def slow(reference) -> SlowTokenizer:
    return SlowTokenizer(reference / "official")


UNITS = (
    *"CNOcn12()=#.:/\\-+@*$%;[]",
    *(
        "[C@@H]",
        "[Na+]",
        "[nH]",
        "[abc]",
        "[12345]",
        "[é]",
        "[(]",
        "[%]3",
        "[]",
        "%12",
        "%1",
        "Cl",
        "Br",
        "Si",
        "Sc",
        "Cn",
        "H",
        "K",
        "\u0663",
    ),
)
TAGS = (
    *("<SMILES>", "</SMILES>", "<protein>", "</protein>", "<dna>", "</dna>", "<rna>", "</rna>", "<MOLFORMULA>", "</MOLFORMULA>"),
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|image_pad|>", "<TS_CONTEXT>", "<SMILES_AUTO_DETECT>", "<box>", "<SMI"),
)
OTHERS = (
    *("the", "Quick ", " brown", "I'm", "DON'T", " 123", "\n", "\n\n", "\r\n", "\t", " ", "   ", "ACGT", "MKTAY", "U", "x", ">", "\n[x\n]"),
    *(
        "é",
        "e\u0301",
        "\u2581",
        "\u00b2",
        "😀",
        "👩\u200d🔬",
        "世界",
        "\u0338",
        "\0",
        "\x1c",
        "\x85",
        "\xa0",
        "\u017f",
        "'\u017f",
        "ǅ",
        "ﬁ",
        "\u212a",
    ),
)


def random_text(generator: random.Random) -> str:
    """Tags, runs of SMILES units, capitals, special tokens and characters of many kinds, in any order."""

    def piece() -> str:
        match generator.randrange(7):
            case 0 | 1:
                return "".join(generator.choices(UNITS, k=generator.randint(1, 25)))
            case 2:
                return "".join(generator.choices("CCCNOcccc1122()=", k=generator.randint(8, 25)))
            case 3:
                return "".join(generator.choices(generator.choice(("ACGTU", "ACDEFGHIKLMNPQRSTVWY")), k=generator.randint(20, 35)))
            case 4:
                return generator.choice(TAGS)
            case 5:
                return "".join(chr(generator.choice((generator.randrange(128), generator.randrange(0xD800)))) for _ in range(4))
            case _:
                return generator.choice(OTHERS)

    return "".join(piece() for _ in range(generator.randint(1, 12)))
