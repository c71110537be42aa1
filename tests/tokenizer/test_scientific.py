"""The released tokenizer: id for id the goldens and the plain rules; nothing is lost; text cannot spell control tokens."""

import json
import pickle
import random
import shutil
import sys

import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer import base, scientific
from interns1pro_jax.tokenizer.scientific import ScientificTokenizer
from tests.tokenizer.conftest import random_text
from tools.tokenizers.slow import SlowTokenizer

TAGS = ("<SMILES>", "</SMILES>", "<protein>", "</protein>", "<dna>", "</dna>", "<rna>", "</rna>")


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    return [random_text(generator) for _ in range(1500)]


@pytest.mark.parametrize("check", ["rules", "rdkit"])
def test_goldens(reference, check):
    if check == "rdkit":
        pytest.importorskip("rdkit")
    tokenizer = ScientificTokenizer.load(reference / "official", check)
    cases = json.loads((reference / "preprocess" / "tokenizer.json").read_text())["cases"]
    assert cases
    for case in cases:
        suffix = "_rule_based" if check == "rules" and "input_ids_rule_based" in case else ""
        ids = tokenizer.encode_markup(case["text"])
        assert ids == case[f"input_ids{suffix}"], case["text"]
        assert tokenizer.tokens(case["text"]) == case[f"tokens{suffix}"]
        assert tokenizer.decode(case["input_ids"]) == case["decoded"]
        assert tokenizer.decode(case["input_ids"], skip_special=True) == case["decoded_skip_special"]


def test_segment_goldens(reference, released):
    tags = {"SMILES": "SMILES", "PROT": "protein", "XNA": "dna"}
    config = json.loads((reference / "official" / "tokenizer_config.json").read_text())
    for case in json.loads((reference / "preprocess" / "sentencepiece_segments.json").read_text()):
        opening, *ids, closing = released.encode_markup(f"<{tags[case['model']]}>{case['text']}</{tags[case['model']]}>")
        assert [i - config[f"offset_{case['model']}"] for i in ids] == case["piece_ids"]
        assert [released.decode([i]) for i in ids] == case["pieces"]
        assert closing == opening + 1


def test_equals_the_plain_rules(texts, released, slow):
    detected = 0
    for text in texts:
        ids = released.encode_markup(text)
        assert ids == slow.encode(text), text
        detected += any("AUTO_DETECT" in token for token in released.tokens(text))
    assert detected > len(texts) / 10


def test_equals_the_plain_rules_with_rdkit(reference, texts):
    chem = pytest.importorskip("rdkit.Chem")
    block = pytest.importorskip("rdkit.rdBase").BlockLogs()
    tokenizer = ScientificTokenizer.load(reference / "official", "rdkit")
    slow = SlowTokenizer(reference / "official", lambda run: chem.MolFromSmiles(run) is not None)
    assert all(tokenizer.encode_markup(text) == slow.encode(text) for text in texts[:300])
    del block


def test_batch_equals_single(texts, released, monkeypatch):
    singly = [released.encode_markup(text) for text in texts]
    assert released.encode_markup_batch(texts) == singly
    monkeypatch.setattr(scientific, "_BATCH_CHARACTERS", 500)  # groups, and texts that are larger than one
    assert released.encode_markup_batch(texts) == singly
    assert released.encode_batch([]) == [] and released.encode_batch(["", ""]) == [[], []]


def test_any_text_survives_the_round_trip(texts, released):
    for text in texts:
        for ids in (released.encode(text), released.encode_markup(text)):
            assert released.decode(ids) == released.cleaned(text)
            assert released.byte_ends(ids)[-1:].tolist() == [len(released.cleaned(text).encode())] * bool(text)
    assert released.cleaned("e\u0301 \u2581") == "é  "


def test_text_cannot_spell_control_tokens(released):
    for token in set(base.SPECIAL_TOKENS) | {"<think>", "</think>", "<tool_call>", "<img>"}:
        ids = released.encode(f"a{token}b")
        assert released.special(token) not in ids and released.special(token) in released.encode_markup(f"a{token}b")
        assert released.decode(ids) == f"a{token}b"
    text = "<SMILES>CCO</SMILES> and <protein>MKT</protein> and <dna>ACG</dna> and <rna>AUG</rna>"
    assert released.encode(text) == released.encode_markup(text)
    assert {released.special(tag) for tag in TAGS} < set(released.encode(text))


def test_placeholder_ids_are_the_release_s(released):
    assert base.model_token_ids(released)["image_token_id"] == 151655
    with pytest.raises(ConfigError, match="'<image>' is not a special token of the release"):
        released.special("<image>")


def test_workers_get_the_same_tokenizer(texts, released):
    copy = pickle.loads(pickle.dumps(released))
    assert copy.fingerprint == released.fingerprint
    assert copy.encode_batch(texts[:50]) == released.encode_batch(texts[:50])


@pytest.fixture
def directory(reference, tmp_path):
    return shutil.copytree(reference / "official", tmp_path / "release", copy_function=shutil.copyfile)


def test_the_fingerprint_is_of_what_gives_the_ids(directory, released):
    (directory / "LICENSE").write_text("other")
    assert ScientificTokenizer.load(directory).fingerprint == released.fingerprint
    lines = (directory / "merges.txt").read_text().split("\n")
    lines[1:3] = reversed(lines[1:3])
    (directory / "merges.txt").write_text("\n".join(lines))
    assert ScientificTokenizer.load(directory).fingerprint != released.fingerprint


def test_errors_name_the_file_and_the_remedy(directory, monkeypatch):
    with pytest.raises(ConfigError, match="smiles_check='chemist' must be 'rules'"):
        ScientificTokenizer.load(directory, "chemist")
    with monkeypatch.context() as without, pytest.raises(ConfigError, match=r"'rdkit' needs rdkit .* or use smiles_check='rules'"):
        without.setitem(sys.modules, "rdkit", None)
        ScientificTokenizer.load(directory, "rdkit")
    for name, content, message in (
        ("tokenizer_XNA.model", b"no model", "tokenizer_XNA.model is not a SentencePiece model"),
        ("tokenizer_XNA.model", None, "tokenizer_XNA.model does not exist"),
        ("chat_template.jinja", b"{% if %}", "the chat template is broken in line 1"),
        ("merges.txt", b"#version: 0.2\na b c\n", "'a b c' is not a pair of tokens"),
        ("merges.txt", b"\xff", "merges.txt is not UTF-8"),
        ("vocab.json", b'{"a": 0, "b": 2}', "must give the ids below 151643, each once"),
        ("vocab.json", b"[]", "holds no JSON object"),
        ("vocab.json", None, r"^\S+vocab\.json does not exist"),
        ("tokenizer_config.json", None, r"^\S+tokenizer_config\.json does not exist"),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"{}", "is not the released one"),
    ):
        path = directory / name
        kept = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            ScientificTokenizer.load(directory)
        path.write_bytes(kept)


def test_texts_that_are_no_unicode_are_refused(released):
    with pytest.raises(ValueError, match=r"half of a surrogate pair \(U\+D800 at character 1\)"):
        released.encode("a\ud800")
