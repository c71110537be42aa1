"""Laws of the byte-level tokenizer: nothing is lost, specials are out of the text's reach, a file gives the same tokenizer."""

import random

import pytest

from interns1pro_jax.config import ConfigError
from interns1pro_jax.tokenizer import base
from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer

CORPUS = ["The Bessel function J_n(x) solves x^2 y'' + x y' + (x^2 - n^2) y = 0.", "CC(=O)Oc1ccccc1C(=O)O aspirin 1899", "Hz and mV"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return ByteBpeTokenizer.train(CORPUS, 400)


def test_any_text_survives_the_round_trip(tokenizer):
    generator = random.Random(0)
    alphabet = "abc XYZ 0123 \n\t\r,.;:()[]{}\\_^$=#@é水🙂\u2581"
    for length in range(60):
        text = "".join(generator.choice(alphabet) for _ in range(length))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]


def test_training_merges_and_keeps_to_the_vocabulary(tokenizer):
    ids = tokenizer.encode(CORPUS[0])
    assert len(ids) < len(CORPUS[0].encode()) / 2
    assert max(ids) < tokenizer.vocab_size <= 400


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1899")] == list("1899")


def test_text_cannot_spell_a_special_token(tokenizer):
    specials = {tokenizer.special(token) for token in base.SPECIAL_TOKENS}
    assert specials == set(range(len(base.SPECIAL_TOKENS)))
    for token in base.SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{token}b")
        assert specials.isdisjoint(ids)
        assert tokenizer.decode(ids) == f"a{token}b"
        assert tokenizer.decode([tokenizer.special(token)]) == token


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = ByteBpeTokenizer.load(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert loaded.encode_batch(CORPUS) == tokenizer.encode_batch(CORPUS)
    assert loaded.encode("<|ts|>") == tokenizer.encode("<|ts|>")
    assert base.model_token_ids(loaded) == base.model_token_ids(tokenizer)


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert ByteBpeTokenizer.train(CORPUS, 400).encode_batch(CORPUS) == tokenizer.encode_batch(CORPUS)


def test_errors_name_the_thing(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=100 must be at least 266"):
        ByteBpeTokenizer.train(CORPUS, 100)
    with pytest.raises(ConfigError, match=r"absent\.json does not exist"):
        ByteBpeTokenizer.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not a readable tokenizer"):
        ByteBpeTokenizer.load(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="'<image>' is not a special token"):
        tokenizer.special("<image>")
