"""Detection looks at every character a bounded number of times, whatever the text; the rule check judges as the plain rules do."""

import random

import pytest

from interns1pro_jax.tokenizer import detection, smiles
from interns1pro_jax.tokenizer.detection import Kind, Span
from tests.tokenizer.conftest import UNITS
from tools.tokenizers import slow

BENZENE = "c1ccccc1c1ccccc1"
ADVERSARIES = {
    "one unit": "C",
    "two-letter units": "Cl",
    "unit that touches a letter": "CCCCCCCCCCCx",
    "open brackets": "[",
    "open brackets with units": "[C",
    "units and an open bracket": "CCCCCCCCCC[ ",
    "closing brackets": "]",
    "brackets": "[C]",
    "empty brackets": "[]",
    "nine units": "CCCCCCCCC ",
    "units and bad edges": "CCCCCCCCCC:.=",
    "bad edges": ":.=",
    "parentheses": "(",
    "rings": "C1",
    "open rings": "%",
    "capitals": "A",
    "capitals, not enough": "A" * 26 + "a",
    "bases and others": "ACGTUX",
    "not ASCII": "C世",
}


class _Counting:
    """A pattern that counts the characters it looks at."""

    def __init__(self, pattern):
        self.pattern, self.characters = pattern, 0

    def match(self, data, at):
        found = self.pattern.match(data, at)
        self.characters += found.end() - at
        return found

    def finditer(self, data):
        for found in self.pattern.finditer(data):
            self.characters += found.end() - found.start()
            yield found


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("ending", ["", "]", "."])
def test_work_is_linear_in_the_text(monkeypatch, name, ending):
    runs, residues = _Counting(detection._RUN), _Counting(detection._RESIDUES)
    monkeypatch.setattr(detection, "_RUN", runs)
    monkeypatch.setattr(detection, "_RESIDUES", residues)
    text = (ADVERSARIES[name] * 3000)[:3000] + ending
    judged: list[str] = []
    detection.find([text], lambda run: judged.append(run) or False)
    assert runs.characters <= len(text)
    assert residues.characters <= len(text)
    assert sum(map(len, judged)) <= len(text)  # a rejected run is not looked at again


@pytest.mark.parametrize("name", ADVERSARIES)
def test_long_adversaries_are_read_to_their_end(name):
    """With anything quadratic in it this would not end today."""
    text = ADVERSARIES[name] * (400_000 // len(ADVERSARIES[name]))
    spans = detection.find([text + " " + BENZENE], smiles.by_rules)
    if "bracket" not in name:  # an open bracket may take the last run for its content
        assert spans[-1] == Span(0, len(text) + 1, len(text) + 1 + len(BENZENE), Kind.SMILES)


def test_texts_of_a_batch_do_not_touch():
    """A bracket closes, and a run ends, within its text."""
    texts = ["[C", f"x]{BENZENE}", "CCCCCC", "CCCCCC", "", "ACGTACGTACGTACGTACGTACGT", "ACGTACGT", BENZENE, "CCCCCCCCCC[N", "C]"]
    together = detection.find(texts, smiles.by_rules)
    alone = [span._replace(text=index) for index, text in enumerate(texts) for span in detection.find([text], smiles.by_rules)]
    assert together == alone == [Span(1, 2, 18, Kind.SMILES), Span(7, 0, 16, Kind.SMILES), Span(8, 0, 10, Kind.SMILES)]


def test_lengths_at_the_border():
    assert detection.find(["CCCCCCCCCC", "CCCCCCCCC"], smiles.by_rules) == [Span(0, 0, 10, Kind.SMILES)]
    assert detection.find(["M" * 27, "M" * 26, "G" * 27, "G" * 26], smiles.by_rules) == [
        Span(0, 0, 27, Kind.PROTEIN),
        Span(2, 0, 27, Kind.XNA),
    ]


def test_rule_check_equals_the_plain_rules():
    generator = random.Random(2)
    verdicts = [0, 0]
    for _ in range(20_000):
        run = "".join(generator.choices(UNITS if generator.random() < 0.5 else "CCCNOccc11=()[]", k=generator.randint(3, 14)))
        ours = smiles.by_rules(run)
        assert ours == (sum(map(slow.is_letter, run)) >= 5 and slow.passes_rules(run)), run
        verdicts[ours] += 1
    assert min(verdicts) > 500


def test_elements_are_those_of_the_plain_rules():
    assert sorted(smiles.TWO_LETTER_ELEMENTS) == sorted(slow.TWO_LETTERS.split("|")) and len(smiles.TWO_LETTER_ELEMENTS) == 104
