"""The report counts what the tokenizers give; samples are read whole; the benchmark refuses unequal ids."""

import argparse
import gzip

import pytest

from interns1pro_jax.tokenizer.released import ReleasedFiles
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from interns1pro_jax.tokenizer.words import PlainTextEncoder
from tools import benchmark_tokenizer, tokenizer_report
from tools.tokenizers import samples
from tools.tokenizers.samples import Sample

MOLECULES = ["CC(=O)OC1=CC=CC=C1C(=O)O", "CCO", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"]


def _read(*arguments):
    parser = argparse.ArgumentParser()
    samples.add_arguments(parser)
    return {sample.kind: sample for sample in samples.read(parser.parse_args(list(map(str, arguments))))}


def test_samples_are_read_whole(tmp_path, capsys):
    (tmp_path / "m.smi").write_text("".join(f"{molecule} name {index}\n" for index, molecule in enumerate(MOLECULES)) + "\n")
    with gzip.open(tmp_path / "p.fasta.gz", "wt") as file:
        file.write(">one\nMKTA\nyiak\n>two\nGG\n")
    genome = "ACGT" * 4000
    (tmp_path / "g.fasta").write_text(f">genome\n{genome}\n")
    (tmp_path / "t.txt").write_text("Prose.")
    found = _read(
        *(
            "--smiles",
            tmp_path / "m.smi",
            "--protein",
            tmp_path / "p.fasta.gz",
            "--dna",
            tmp_path / "g.fasta",
            "--prose",
            tmp_path / "t.txt",
        )
    )
    assert found["SMILES"].texts == MOLECULES
    assert found["protein"].texts == ["MKTAYIAK", "GG"]
    assert len(found["DNA"].texts) > 1 and "".join(found["DNA"].texts) == genome
    assert found["prose"] == Sample("prose", "t.txt", ["Prose."])
    assert "no " not in capsys.readouterr().out
    assert set(_read("--smiles", tmp_path / "m.smi", "--prose", tmp_path / "t.txt")) == {"SMILES", "prose"}
    assert "no protein: give --protein FILE" in capsys.readouterr().out


def test_the_report_counts_tokens(reference, tmp_path):
    files = ReleasedFiles.read(reference / "official")
    tokenizer, plain = ScientificTokenizer(files), PlainTextEncoder(files.vocab, files.merges)
    detected, tagged = tokenizer_report.measure(tokenizer, plain, Sample("SMILES", "", MOLECULES))
    assert detected.characters == tagged.characters == sum(map(len, MOLECULES))
    assert detected.found == 2 / 3  # a short one is not detected
    assert detected.ours == sum(len(tokenizer.encode(text)) for text in MOLECULES) < detected.plain
    assert tagged.ours == sum(len(tokenizer.encode(f"<SMILES>{text}</SMILES>")) for text in MOLECULES)
    assert detected.gain == pytest.approx(100 * (detected.plain - detected.ours) / detected.ours)
    (prose,) = tokenizer_report.measure(tokenizer, plain, Sample("prose", "", ["The quick brown fox."]))
    assert prose.plain == prose.ours and prose.gain == 0
    tokenizer_report.draw([detected, tagged, prose], tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_the_benchmark_refuses_unequal_ids():
    def encode(texts):
        return [list(text.encode()) for text in texts]

    sample = Sample("SMILES", "", MOLECULES * 4)
    speeds = benchmark_tokenizer.measure(sample, {"ours": encode, "rules": encode}, parts=2, characters=200)
    assert [speed.encoder for speed in speeds] == ["ours", "rules"]
    with pytest.raises(SystemExit, match="are not those of the plain rules"):
        benchmark_tokenizer.measure(sample, {"ours": encode, "rules": lambda texts: [[] for _ in texts]}, parts=2, characters=200)
