"""Text that the student writes, for its teacher to say what it would have written next (2306.13649).

A row goes on from the beginning of its text by what the student draws. Its pieces may be others than the tokenizer
would cut that text into; the teacher reads the bytes in tokens of its own, and says what is next where both end. Of
text that nobody but the student wrote, nothing is learned but what the teacher says of it.
"""

from typing import Any

import jax
import numpy as np

from vishwamai_eqx import engine
from vishwamai_eqx.architecture import Model
from vishwamai_eqx.config import Config, DistillConfig
from vishwamai_eqx.data import Batch, Dataset, DrawnBatch, PairedBatch
from vishwamai_eqx.feed import place
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.sampling import Sampling
from vishwamai_eqx.targets import Targets

# Of a row, what the student goes on from: enough to know what kind of text it is.
OPENING_SHARE = 4


def writes(distill: DistillConfig, n: Any) -> Any:
    """Whether the student writes batch n itself."""
    return n % distill.on_policy == distill.on_policy - 1 if distill.on_policy else n < 0


def batch(
    config: Config, rows: Dataset | Pairs | Targets, n: int, sharding: jax.sharding.Sharding, model: Model
) -> Batch | PairedBatch | DrawnBatch:
    """Batch n as a step takes it that has come to this model."""
    return own(config.distill, rows, n, model, place(rows, n, sharding, config.optim.microbatches))


def own(distill: DistillConfig, rows: Dataset | Pairs | Targets, n: int, model: Model, placed: Any) -> Any:
    """The placed batch n, or what the student makes of it where that is what the step is to learn from.

    The same numbers whenever it is asked with the model of that step.
    """
    if not writes(distill, n) or not isinstance(rows, Pairs):
        return placed
    whole = written(rows, n, model)
    return jax.tree.map(
        lambda field, like: jax.make_array_from_callback(
            like.shape, like.sharding, field.reshape(like.shape).__getitem__
        ),
        whole,
        placed,
    )


def written(rows: Pairs, n: int, model: Model) -> PairedBatch:
    """Batch n with the student's own text after the beginning of each row's first document."""
    tokenizer, given = rows.student.tokenizer, rows.student.batch(n)
    opening = max(1, rows.seq_len // OPENING_SHARE)
    prompts = [
        tokens[: min(opening, int((segments == 1).sum()))].tolist()
        for tokens, segments in zip(np.asarray(given.tokens), np.asarray(given.segment_ids), strict=True)
    ]
    most = rows.seq_len - opening
    continued = engine.generate(
        model,
        prompts,
        max_new_tokens=most,
        eos_id=tokenizer.eos_id,
        pieces=tokenizer.vocab_size,
        sampling=Sampling(seed=rows.student.seed + n),
    )
    fields = np.zeros((4, *given.tokens.shape), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts, continued, strict=True)):
        text = np.array(prompt + new + [tokenizer.eos_id] * (len(new) < most), np.int32)
        here = slice(len(text) - 1)
        fields[0, row, here], fields[1, row, here] = text[:-1], text[1:]
        fields[2, row, here], fields[3, row, here] = 1, np.arange(len(text) - 1)
    return rows.pair(Batch(*fields))
