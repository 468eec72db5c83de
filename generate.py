"""Write text with a trained model: prompt -> prefill -> decode loop -> text.

    python generate.py --run-dir runs/tiny --prompt 'def main('
    python generate.py --model gemma-7b --prompt 'The capital of France is'
    echo 'import os' | python generate.py --top-p 0.9 --num-samples 3

One sample streams as it is made; several are shown when all are done.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

import vishwamai_eqx  # isort: skip  (before jax, whose platform it chooses)

import jax.numpy as jnp

from vishwamai_eqx import command_line, decode, evaluation, gemma, narrow
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.tokenizer import VishwamAITokenizer


@dataclass(frozen=True)
class Settings:
    """What `generate.py` takes."""

    run_dir: Path = Path("runs/tiny")
    """The run whose newest checkpoint writes, or an exported one."""
    model: Path | None = None
    """A Gemma folder of Hugging Face, which writes in the run's stead."""
    prompt: Annotated[str | None, tyro.conf.arg(constructor=str, help_behavior_hint="")] = None
    """What the text begins with; none: standard input."""
    max_new_tokens: int = 128
    """Tokens to write at most; a text may end before."""
    temperature: float = 0.8
    """0 takes the likeliest token each time, 1 draws as the model says."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach p."""
    seed: int = 0
    """The same seed writes the same texts."""
    weights: Literal["int8", "fp8"] | None = None
    """The type that weights are held in, in half the bytes; none: as they are computed with."""
    num_samples: int = 1
    """Texts to write, each with draws of its own."""
    json: bool = False
    """Print one JSON object, with the tokens and the speed, when all is written."""


class Text:
    """The text of ids that come a few at a time; bytes of a character that is not whole yet are held back."""

    def __init__(self, tokenizer: VishwamAITokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def add(self, ids: list[int], last: bool = False) -> str:
        self.ids += ids
        whole = self.tokenizer.decode(self.ids)
        whole = whole if last else whole.rstrip("\ufffd")
        new, self.shown = whole[len(self.shown) :], whole
        return new


class Writer(NamedTuple):
    """What writes."""

    model: decode.CachedModel
    tokenizer: VishwamAITokenizer
    max_length: int


def load(settings: Settings) -> Writer:
    """The run's model, or the Gemma that was asked for."""
    if settings.model is None:
        model, tokenizer, config = vishwamai_eqx.load(settings.run_dir)
        # What a fine-tuned Gemma read in training is no bound of what it can read.
        longest = config.model.max_seq_len if config.gemma is None else config.gemma.max_position_embeddings
        return Writer(narrow.quantize(model, settings.weights), tokenizer, longest)
    dtype = compute_dtype("auto")
    decoder = gemma.load(settings.model, jnp.dtype(dtype)).decoder
    decoder = narrow.quantize(decoder, settings.weights)
    return Writer(decoder, gemma.tokenizer(settings.model), decoder.config.max_position_embeddings)


def generate(settings: Settings, sampling: decode.Sampling, writer: Writer) -> None:
    prompt = sys.stdin.read() if settings.prompt is None else settings.prompt
    ids = [writer.tokenizer.bos_id, *writer.tokenizer.encode_ids(prompt)]
    texts = [Text(writer.tokenizer) for _ in range(settings.num_samples)]
    pieces = decode.stream(
        writer.model,
        [ids] * settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        eos_id=writer.tokenizer.eos_id,
        sampling=sampling,
        seed=settings.seed,
        max_length=writer.max_length,
        pieces=writer.tokenizer.vocab_size,
    )
    began = time.perf_counter()
    # One sample is shown as it comes; several would be shuffled together, so each is shown when all are done.
    visible = evaluation.printable if sys.stdout.isatty() else str
    streams = settings.num_samples == 1 and not settings.json
    if streams:
        print(prompt, end="", flush=True)
    for new in pieces:
        shown = [text.add(piece) for text, piece in zip(texts, new, strict=True)]
        if streams:
            print(visible(shown[0]), end="", flush=True)
    endings = [text.add([], last=True) for text in texts]
    seconds, tokens = time.perf_counter() - began, sum(len(text.ids) for text in texts)
    if settings.json:
        samples = [{"text": text.shown, "tokens": text.ids} for text in texts]
        print(json.dumps({"prompt": prompt, "samples": samples, "tokens_per_second": tokens / seconds}))
    elif streams:
        print(visible(endings[0]))
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{prompt}{visible(text.shown)}")


def checked(settings: Settings) -> decode.Sampling:
    """How to draw; ValueError with a line for each setting that is impossible."""
    mistakes = []
    # All samples are written side by side, each with a cache of its own.
    for name, least, most in (("num_samples", 1, 4096), ("max_new_tokens", 1, 2**31 - 1), ("seed", 0, 2**31 - 1)):
        if not least <= (value := getattr(settings, name)) <= most:
            nearest = least if value < least else most
            mistakes.append(f"{name}={value} must be at least {least} and at most {most}; take {nearest}.")
    try:
        sampling = decode.Sampling(settings.temperature, settings.top_k, settings.top_p)
    except ValueError as error:
        raise ValueError("\n".join([*mistakes, str(error)])) from None
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return sampling


def main(argv: list[str]) -> int:
    try:
        settings = command_line.parse_settings(Settings, argv, Settings(), __doc__)
        generate(settings, checked(settings), load(settings))
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads has read enough, as `head` does; else Python would say so once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
