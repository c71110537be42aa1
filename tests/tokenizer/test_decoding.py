"""A stream gives out, piece by piece, what decoding gives at once."""

import random

import pytest

from interns1pro_jax.tokenizer.byte_bpe import ByteBpeTokenizer

TEXT = "naïve 世界 👩\u200d🔬 é <SMILES>CC(=O)O</SMILES> \u2211x"


@pytest.fixture(scope="module")
def trained():
    return ByteBpeTokenizer.train(["abc"], 268)  # hardly a merge: most characters are several tokens


def _streamed(stream, ids):
    pieces = [stream.push(i) for i in ids]
    return pieces, stream.finish()


@pytest.mark.parametrize("name", ["trained", "released"])
def test_streamed_equals_decoded(request, name):
    tokenizer, generator = request.getfixturevalue(name), random.Random(1)
    stream = tokenizer.stream()
    for _ in range(200):  # random ids break off characters everywhere
        ids = [generator.randrange(min(tokenizer.vocab_size, 600)) for _ in range(generator.randrange(30))]
        pieces, rest = _streamed(stream, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["trained", "released"])
def test_a_character_is_held_back_until_it_is_whole(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(TEXT)
    pieces, rest = _streamed(tokenizer.stream(), ids)
    assert "".join(pieces) == TEXT and rest == ""
    assert "" in pieces
    for count in range(len(ids)):
        assert TEXT.startswith("".join(pieces[:count]))
    pieces, rest = _streamed(tokenizer.stream(), tokenizer.encode("\U00013000")[:-1])  # a hieroglyph; no token holds it
    assert pieces and "".join(pieces) == "" and rest == "\ufffd"


def test_hidden_tokens_are_left_out(released):
    ids = [released.special("<|im_start|>"), *released.encode("hi"), released.special("<think>"), released.special("<|im_end|>")]
    pieces, _ = _streamed(released.stream(skip_special=True), ids)
    assert "".join(pieces) == released.decode(ids, skip_special=True) == "hi<think>"


@pytest.mark.parametrize("name", ["trained", "released"])
def test_an_id_that_is_none_is_refused(request, name):
    tokenizer = request.getfixturevalue(name)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is not in 0..{tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])
        with pytest.raises(ValueError, match=f"id {wrong} is not in"):
            tokenizer.stream().push(wrong)
