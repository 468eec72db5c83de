"""A byte-pair vocabulary from text."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

# The trainer reads sentences and leaves out longer ones than it is told; lines are cut to this many characters.
SENTENCE_CHARACTERS = 2000
# A vocabulary does not get better with more text than this, and the trainer holds all of it in memory.
ENOUGH_BYTES = 32 << 20


def train(texts: Iterable[str | Path], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces that keeps text as it is; a `Path` is read.

    Pieces do not cross lines, digits stand alone, and what has no piece is spelled in bytes.
    """
    model, of_text = io.BytesIO(), []

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except Exception as error:
            # The trainer would make of it one of its own.
            of_text.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            # Of fewer than the special pieces it says only which line of its own source refused them.
            vocab_size=max(vocab_size, 4),
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[BOS]",
            eos_piece="[EOS]",
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if of_text:
            raise of_text[0] from None
        raise ValueError(_explained(vocab_size, str(error))) from None
    return model.getvalue()


def _sentences(texts: Iterable[str | Path]) -> Iterator[str]:
    for text in texts:
        whole = text.read_bytes().decode() if isinstance(text, Path) else text
        for line in whole.split("\n"):
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]


def _explained(vocab_size: int, error: str) -> str:
    """SentencePiece's complaint in terms of the setting."""
    if match := re.search(r"value <= (\d+)", error):
        return (
            f"vocab_size={vocab_size}: the text yields at most {match[1]} pieces; give at most {match[1]}, or more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size}: bytes, special tokens and the text's characters alone need {match[1]}; "
            f"give at least {match[1]}"
        )
    if "sentences_.empty()" in error:
        return f"vocab_size={vocab_size}: there is no text to train a tokenizer on; give files that have some"
    if "all_chars_count" in error:
        return (
            f"vocab_size={vocab_size}: the text is nothing but zero characters (U+0000), which a tokenizer is not "
            "trained on; give files that have other text"
        )
    return f"vocab_size={vocab_size}: SentencePiece could not train ({error})"
