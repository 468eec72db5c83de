"""Texts as words that are encoded once each: the ids are those of the texts as a whole."""

import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_eqx import words
from vishwamai_eqx.tokenizer import VishwamAITokenizer

FIXTURE = Path(__file__).parent / "huggingface"
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8") | st.sampled_from("  \n\ta human▁\0é漢👩"), max_size=60), max_size=6
)


@given(TEXTS)
def test_words_are_those_of_an_expression(texts):
    found = words.distinct([text.encode() for text in texts])
    expected = [re.findall(r" *[^ \n]+| +|\n", text) for text in texts]
    # A text that ends in spaces ends their word too, whatever the next one begins with.
    assert [found.words[which] for which in found.which] == [word for each in expected for word in each]
    assert found.ends.tolist() == np.cumsum([len(each) for each in expected], dtype=int).tolist()
    assert len(set(found.words)) == len(found.words)


@given(TEXTS)
def test_ids_are_those_of_the_texts_as_a_whole(texts):
    tokenizer = VishwamAITokenizer(FIXTURE)
    assert tokenizer._words_stand_alone
    encoded = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode_ids(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_words_that_cannot_be_told_apart_are_not_taken_for_each_other(monkeypatch):
    monkeypatch.setattr(words, "_NUMBERS", np.ones(words._PLACES, np.uint64))
    texts = ["on", "no"]
    assert words.distinct([text.encode() for text in texts]) is None
    tokenizer = VishwamAITokenizer(FIXTURE)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode_ids(text) for text in texts]
    # Further on in a word the numbers come again: two that differ only there would have one sum.
    monkeypatch.undo()
    one, other = b"x" * words._PLACES, b"y" * words._PLACES
    assert words.distinct([one + other, other + one]) is None


@pytest.mark.parametrize("setting", [{"split_by_whitespace": False}, {"treat_whitespace_as_suffix": True}])
def test_a_model_whose_pieces_reach_across_words_gets_whole_texts(tmp_path, setting):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat of the dog of the house"] * 9),
        model_prefix=str(tmp_path / "model"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **setting,
    )
    tokenizer = VishwamAITokenizer(tmp_path / "model.model")
    assert not tokenizer._words_stand_alone
    texts = ["the cat of the dog", "of the  house\n of the", ""]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode_ids(text) for text in texts]
