"""Write text with a trained model: prompt -> prefill -> decode loop -> text.

    python generate.py --run-dir runs/tiny --prompt 'def main('
    python generate.py --model gemma-7b --prompt 'The capital of France is'
    echo 'import os' | python generate.py --top-p 0.9 --num-samples 3
    python generate.py --model gemma-7b-it --chat
    python generate.py --prompts questions.jsonl --out answers.jsonl

One sample streams as it is made; several are shown when all are done.

A batch that was stopped goes on with the same command.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

import vishwamai_eqx  # isort: skip  (before jax, whose platform it chooses)

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vishwamai_eqx import chat, command_line, decode, evaluation, gemma, narrow, prompt_file
from vishwamai_eqx.apart import apart
from vishwamai_eqx.engine import Engine, Request, Result
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.prompt_file import Out, Prompt
from vishwamai_eqx.sampling import Sampling, seeded
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
    prompts: Path | None = None
    """A file of prompts, each a line {"prompt": "..."}, to which --out gets what is written."""
    out: Path | None = None
    """Where that goes, a line for each prompt; what it has already is not written again."""
    chat: bool = False
    """Answer standard input line by line, each as what follows all before."""
    max_new_tokens: int = 128
    """Tokens to write at most; a text may end before."""
    temperature: float = 0.8
    """0 takes the likeliest token each time, 1 draws as the model says."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Draw from tokens at least so likely as this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divide the logits of what the text has by it."""
    presence_penalty: float = 0.0
    """Take it off the logits of what has been written."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    seed: int = 0
    """The same seed writes the same texts."""
    weights: Literal["int8", "fp8"] | None = None
    """The type that weights are held in, in half the bytes; none: as they are computed with."""
    num_samples: int = 1
    """Texts to write to each prompt, each with draws of its own."""
    rows: int = 16
    """Texts to write at a time; others wait until one is done."""
    lookup: int = 0
    """Tokens that each step guesses from what the text has already; right ones are written at once, the text is the
    same."""
    logprobs: bool = False
    """Give the log-probability of each token too, in JSON."""
    json: bool = False
    """Print one JSON object, with the tokens and the speed, when all is written."""
    dry_run: bool = False
    """Write nothing: compile for TPUs that are not there, and say what memory and bytes a token it would take. --model
    may be a preset or the name of a Gemma."""
    topology: str = "v5e:2x4"
    """Of a dry run."""
    length: int = 2048
    """Tokens of its rows."""


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
        return Writer(apart(narrow.quantize(model, settings.weights)), tokenizer, longest)
    dtype = compute_dtype("auto")
    decoder = narrow.quantize(gemma.load(settings.model, jnp.dtype(dtype)).decoder, settings.weights)
    return Writer(apart(decoder), gemma.tokenizer(settings.model), decoder.config.max_position_embeddings)


def engine_of(settings: Settings, writer: Writer, rows: int) -> Engine:
    """What writes so many rows at a time."""
    return Engine(
        writer.model,
        eos_id=writer.tokenizer.eos_id,
        tokenizer=writer.tokenizer,
        slots=rows,
        max_length=writer.max_length,
        pieces=writer.tokenizer.vocab_size,
        drafts=settings.lookup,
    )


def requests(settings: Settings, sampling: Sampling, writer: Writer, prompt: str, *of: int) -> list[Request]:
    """The texts to write to a prompt, the samples of which draw by the seed, what else tells them apart, and theirs."""
    ids = [writer.tokenizer.bos_id, *writer.tokenizer.encode_ids(prompt)]
    own = dataclasses.replace(sampling, seed=(settings.seed, *of))
    return [Request(ids, each, settings.max_new_tokens, settings.stop) for each in seeded(own, settings.num_samples)]


def described(settings: Settings, result: Result) -> dict[str, Any]:
    """A text as JSON."""
    logprobs = {"logprobs": result.logprobs} if settings.logprobs else {}
    return {"text": result.text, "tokens": result.tokens, **logprobs, "ending": result.ending}


def generate(settings: Settings, sampling: Sampling, writer: Writer) -> None:
    """Write to one prompt."""
    prompt = sys.stdin.read() if settings.prompt is None else settings.prompt
    engine = engine_of(settings, writer, min(settings.num_samples, settings.rows))
    results = {engine.submit(each): Result() for each in requests(settings, sampling, writer, prompt)}
    began = time.perf_counter()
    # One sample is shown as it comes; several would be shuffled together, so each is shown when all are done.
    visible = evaluation.printable if sys.stdout.isatty() else str
    streams = settings.num_samples == 1 and not settings.json
    if streams:
        print(prompt, end="", flush=True)
    for event in engine.events():
        results[event.request].add(event)
        if streams:
            print(visible(event.text), end="", flush=True)
    seconds, tokens = time.perf_counter() - began, sum(len(result.tokens) for result in results.values())
    if settings.json:
        samples = [described(settings, result) for result in results.values()]
        print(json.dumps({"prompt": prompt, "samples": samples, "tokens_per_second": tokens / seconds}))
    elif streams:
        print()
    else:
        for number, result in enumerate(results.values(), 1):
            print(f"--- {number}\n{prompt}{visible(result.text)}")
    if settings.lookup:
        print(f"accepted {engine.acceptance:.1%} of the guesses", file=sys.stderr)


def write_batch(settings: Settings, sampling: Sampling, writer: Writer, prompts: list[Prompt], out: Out) -> list[str]:
    """Write to each prompt of a file that nothing is written to yet; a sentence for each to which nothing can be."""
    engine = engine_of(settings, writer, min(settings.num_samples * len(prompts), settings.rows))
    todo, refused = prompt_file.left(prompts, out), []
    of: dict[int, tuple[Prompt, dict[int, Result]]] = {}

    def submit() -> None:
        # As many as may have a row next, so that what they share is found.
        while len(engine.waiting) < 2 * settings.rows and (prompt := next(todo, None)):
            try:
                # Its own draws, whatever is written beside it.
                texts = requests(settings, sampling, writer, prompt.text, prompt.line)
                results = {engine.submit(each): Result() for each in texts}
            except ValueError as refusal:
                refused.append(f"{settings.prompts}:{prompt.line}: {refusal}")
                continue
            of.update(dict.fromkeys(results, (prompt, results)))

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(prompts), completed=len(out.done), speed="")
        began = time.perf_counter()
        submit()
        for event in engine.events():
            prompt, results = of[event.request]
            results[event.request].add(event)
            if event.ending and all(result.ending for result in results.values()):
                out.add(prompt, [described(settings, result) for result in results.values()])
                for number in results:
                    del of[number]
                speed = engine.written / (time.perf_counter() - began)
                bar.update(task, completed=len(out.done), speed=f"{speed:,.0f} tokens/s")
            submit()
    return refused


def batch(settings: Settings, sampling: Sampling) -> int:
    """Write to a file of prompts; the exit code."""
    assert settings.prompts is not None and settings.out is not None
    prompts, broken = prompt_file.read(settings.prompts)
    given = len(prompts) + len(broken)
    with Out(settings.out, prompts) as out:
        try:
            if any(prompt_file.left(prompts, out)):
                broken += write_batch(settings, sampling, load(settings), prompts, out)
        except OSError as error:
            print(
                f"{settings.out}: {error.strerror}; what is written to {len(out.done)} of {given} prompts is "
                "kept, and with room the same command goes on from there.",
                file=sys.stderr,
            )
            return 1
        print(f"{settings.out}: {len(out.done)} of {given} prompts", file=sys.stderr)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 2 if broken else 0


def converse(settings: Settings, sampling: Sampling, writer: Writer) -> None:
    """Answer lines of standard input; what was said before stays in the cache."""
    # The rows of other texts would only take room.
    engine, tokenizer = engine_of(settings, writer, 1), writer.tokenizer
    before, between = chat.marks(tokenizer)
    stop = (*settings.stop, *chat.ends(tokenizer))
    visible = evaluation.printable if sys.stdout.isatty() else str
    said = [tokenizer.bos_id]
    for turn, line in enumerate(chat.lines()):
        ids = [*said, *tokenizer.encode_ids(before + line + between)]
        draws = dataclasses.replace(sampling, seed=(settings.seed, turn))
        room = writer.max_length - len(ids)
        if room < 1:
            print(
                f"with {len(ids)} tokens the conversation is over the model's context of {writer.max_length}; "
                "begin a new one.",
                file=sys.stderr,
            )
            return
        engine.submit(Request(ids, draws, min(settings.max_new_tokens, room), stop))
        answer = Result()
        for event in engine.events():
            answer.add(event)
            print(visible(event.text), end="", flush=True)
        print()
        said = ids + answer.tokens


def plan(settings: Settings) -> int:
    """Say what generation would be on a topology; the exit code: 0, or 3 where it does not fit."""
    # Only a dry run looks for the TPU compiler.
    from vishwamai_eqx import dry_run, generation_plan

    model = str(settings.run_dir if settings.model is None else settings.model)
    report = generation_plan.examine(model, settings.topology, settings.length)
    print(json.dumps(report) if settings.json else generation_plan.text(report))
    return dry_run.FITS if report["fits"] else dry_run.TOO_BIG


def checked(settings: Settings) -> Sampling:
    """How to draw; ValueError with a line for each setting that is impossible."""
    mistakes = []
    # Each row has a cache of its own.
    limits = ("num_samples", 1, 4096), ("max_new_tokens", 1, 2**31 - 1), ("seed", 0, 2**31 - 1), ("rows", 1, 4096)
    for name, least, most in (*limits, ("lookup", 0, 64), ("length", 16, 2**31 - 1)):
        if not least <= (value := getattr(settings, name)) <= most:
            nearest = least if value < least else most
            mistakes.append(f"{name}={value} must be at least {least} and at most {most}; take {nearest}.")
    if (settings.prompts is None) != (settings.out is None):
        given, missing = ("out", "prompts") if settings.prompts is None else ("prompts", "out")
        mistakes.append(f"{given}={getattr(settings, given)} needs --{missing}; give both, or none.")
    if settings.logprobs and settings.prompts is None and not settings.json:
        mistakes.append("logprobs=True is for JSON; give --json too.")
    if "" in settings.stop:
        mistakes.append("stop='' must have a character; leave it out to stop nowhere.")
    try:
        sampling = Sampling(
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
            settings.repetition_penalty,
            settings.presence_penalty,
        )
    except ValueError as error:
        raise ValueError("\n".join([*mistakes, str(error)])) from None
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return sampling


def main(argv: list[str]) -> int:
    try:
        settings = command_line.parse_settings(Settings, argv, Settings(), __doc__)
        sampling = checked(settings)
        if settings.dry_run:
            return plan(settings)
        if settings.prompts is not None:
            return batch(settings, sampling)
        write = converse if settings.chat else generate
        write(settings, sampling, load(settings))
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
