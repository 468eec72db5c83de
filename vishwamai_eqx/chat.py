"""What stands between the turns of a conversation: the marks that a tokenizer has for them, else line ends."""

import sys
from collections.abc import Iterator

from vishwamai_eqx.tokenizer import VishwamAITokenizer

# Of Gemma's models for conversation: https://ai.google.dev/gemma/docs/core/prompt-structure
BEGIN, END = "<start_of_turn>", "<end_of_turn>"


def marked(tokenizer: VishwamAITokenizer) -> bool:
    """Whether the tokenizer has pieces for the turns of a conversation."""
    return all(len(tokenizer.encode_ids(mark)) == 1 for mark in (BEGIN, END))


def marks(tokenizer: VishwamAITokenizer) -> tuple[str, str]:
    """What comes before a line of the user's, and between it and the answer."""
    return (f"{BEGIN}user\n", f"{END}\n{BEGIN}model\n") if marked(tokenizer) else ("", "\n")


def ends(tokenizer: VishwamAITokenizer) -> tuple[str, ...]:
    """What ends an answer."""
    return (END,) if marked(tokenizer) else ()


def lines() -> Iterator[str]:
    """What the user says, to the end of standard input; a prompt is shown to people only."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line.rstrip("\n")
