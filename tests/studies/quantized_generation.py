"""What weights in 8 bits cost a run's text: `python -m tests.studies.quantized_generation RUN [int8 | fp8 ...]`.

Held-out bits per byte and bytes of weights beside the run's own, and where the likeliest continuation of each of
`--prompts` held-out beginnings first is another token.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vishwamai_eqx
from tests.studies.cases import study
from vishwamai_eqx import data, engine, evaluation, narrow
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.sampling import Sampling

PROMPT, WRITTEN = 16, 32


@jax.jit
def evaluate(model: Any, batch: data.Batch) -> tuple[jax.Array, jax.Array]:
    """Nats and tokens of a batch."""
    hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
    said = jax.nn.log_softmax(model.head(hidden))
    real = batch.segment_ids > 0
    nats = -jnp.take_along_axis(said, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(real, nats, 0.0)), real.sum()


class Run:
    """What is asked of a run's model and of those made of it."""

    def __init__(self, run_dir: Path, rows: int, prompts: int):
        self.model, self.tokenizer, self.config = vishwamai_eqx.load(run_dir)
        corpus = data.load_documents(self.config.data, self.config.seed)
        optim, length = self.config.optim, self.config.model.max_seq_len
        self.dataset = data.prepare(
            corpus, self.tokenizer, seq_len=length, batch_size=optim.batch_size, seed=self.config.seed
        )
        self.rows, self.run_dir = rows, run_dir
        batches = self.dataset.held_out_batches(1, prompts)
        self.prompts = [batch.tokens[0, :PROMPT].tolist() for batch in batches]

    @functools.cached_property
    def own(self) -> dict[str, Any]:
        return self.asked(self.model)

    def asked(self, model: Any) -> dict[str, Any]:
        found = evaluation.held_out(evaluate, model, self.dataset, make_mesh({}), 8, self.rows)
        greedy = Sampling(temperature=0.0)
        written = engine.generate(
            model, self.prompts, max_new_tokens=WRITTEN, eos_id=self.tokenizer.eos_id, sampling=greedy
        )
        return {"bits_per_byte": found.bits_per_byte, "bytes": narrow.size(model), "written": written}

    def measure(self, weights: narrow.Weights) -> dict[str, Any]:
        here, own = self.asked(narrow.quantize(self.model, weights)), self.own
        first = [parted(*pair) for pair in zip(own["written"], here["written"], strict=True)]
        other = sorted(at for at in first if at is not None)
        return {
            "run": self.run_dir.name,
            "precision": self.config.precision,
            "steps": self.config.optim.steps,
            "held_out_rows": self.rows,
            "bits_per_byte": {"own": own["bits_per_byte"], "here": here["bits_per_byte"]},
            "above": round(here["bits_per_byte"] / own["bits_per_byte"] - 1, 6),
            "bytes": {"own": own["bytes"], "here": here["bytes"], "share": round(here["bytes"] / own["bytes"], 4)},
            "prompts": len(first),
            "tokens_each": WRITTEN,
            "the_same": len(first) - len(other),
            "first_other_token": other,
            "median_of_those": float(np.median(other)) if other else None,
        }


def parted(one: list[int], other: list[int]) -> int | None:
    """The first place where two texts have not the same token, from 0; None if there is none."""
    if one == other:
        return None
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), min(len(one), len(other))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", nargs="*", metavar="WEIGHTS")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=100)
    chosen = parser.parse_args()
    of = Run(chosen.run, chosen.rows, chosen.prompts)
    cases = {"int8": "int8", "fp8": "fp8"}
    sys.exit(study(cases, of.measure, Path(__file__).with_suffix(".json"), chosen.weights))
