"""How good a model is: bits per byte of held-out text, and what it writes by itself."""

import io
import math
import tokenize
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vishwamai_eqx import engine
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import BATCH_AXES
from vishwamai_eqx.data import Batch, Dataset
from vishwamai_eqx.mesh import on_mesh, sum_over
from vishwamai_eqx.sampling import Sampling
from vishwamai_eqx.tokenizer import VishwamAITokenizer

P = PartitionSpec
ROWS = P(BATCH_AXES)  # of [rows, seq]


class HeldOut(NamedTuple):
    """The cross-entropy of held-out text."""

    loss: float
    """In nats a token."""
    bits_per_byte: float
    """Of source text: comparable whatever the tokenizer."""


def make_evaluate(
    token_loss: Callable[[Model, Model, Array, Batch], Array], mesh: Mesh, specs: Model
) -> Callable[[Model, Batch], tuple[Array, Array]]:
    """The sum of the cross-entropy in nats over a batch, and its tokens; `token_loss` is the training step's own."""

    def evaluate(model: Model, batch: Batch) -> tuple[Array, Array]:
        hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, placement=specs)
        return token_loss(model, specs, hidden, batch), sum_over((batch.segment_ids > 0).sum(), *BATCH_AXES)

    in_specs = (specs, on_mesh(ROWS, mesh))
    return jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=in_specs, out_specs=(P(), P()), check_vma=True))


def held_out(
    evaluate: Callable[[Model, Batch], tuple[Array, Array]],
    model: Model,
    dataset: Dataset,
    mesh: Mesh,
    rows: int,
    limit: int | None = None,
) -> HeldOut:
    """Measure all held-out rows, or the first `limit`, `rows` at a time; `evaluate` sums nats and tokens of a batch."""
    nats, tokens, source_bytes = 0.0, 0, 0
    sharding = NamedSharding(mesh, ROWS)
    for batch in dataset.held_out_batches(rows, limit):
        sent = jax.tree.map(lambda rows: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__), batch)
        batch_nats, batch_tokens = evaluate(model, sent)
        source_bytes += dataset.source_bytes(batch)
        nats += float(batch_nats)
        tokens += int(batch_tokens)
    return HeldOut(nats / tokens, nats / math.log(2) / source_bytes)


def write(model: Model, tokenizer: VishwamAITokenizer, *, tokens: int, seed: int, samples: int = 1) -> list[str]:
    """Texts of at most so many tokens that the model writes from nothing."""
    rows = engine.generate(
        model,
        [[tokenizer.bos_id]] * samples,
        max_new_tokens=tokens,
        eos_id=tokenizer.eos_id,
        pieces=tokenizer.vocab_size,
        sampling=Sampling(temperature=0.8, top_p=0.95, seed=seed),
    )
    return [tokenizer.decode(row) for row in rows]


def printable(text: str) -> str:
    """The text as a terminal may be given it: control characters, lines and tabs apart, as Python would write them.

    A model that has learned little writes any byte, and some move the cursor or change the terminal's colours.
    """
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )


def python_lines(texts: list[str]) -> float:
    """The share of the texts' complete lines, blank ones aside, that Python's own tokenizer accepts one by one."""
    lines = [line.strip() for text in texts for line in text.split("\n")[:-1] if line.strip()]
    return sum(map(_is_python, lines)) / max(len(lines), 1)


def _is_python(line: str) -> bool:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)
