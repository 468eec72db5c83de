"""What a teacher is worth to a student: `python -m tests.studies.distillation [CASE ...]`, in about an hour.

The text is the running Python's library. A teacher of 2.3 times tiny's parameters, with a vocabulary of 4,096, reads it
first; its vocabulary is cut to 2,048 for students of 0.3 million parameters, which all read as many tokens, the same
ones for a seed, with and without it. What is compared is bits per byte of held-out text, which no model has read, as
`train.py` measures it at a run's end. Each loss term is taken away from all of them together, and beside the target of
`distill.next_piece` stands the usual one, the teacher's probabilities of the pieces that both have, renormalised.

Runs are kept in `runs/distillation`: a study that was stopped goes on where it was.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import train
from tests.studies.cases import study
from vishwamai_eqx import data, divergence, logbook, run
from vishwamai_eqx.prune import TEACHER_PIECES

RUNS = Path("runs/distillation")
TEACHER = "--model.vocab-size 4096 --model.hidden-size 192 --model.num-heads 3 --model.ffn-dim 384 --steps 150"
TEACHER += " --optim.batch-size 16 --optim.learning-rate 3e-3"
STUDENT = "--model.vocab-size 2048 --model.hidden-size 64 --model.num-layers 2 --model.num-experts 4 --model.ffn-dim 96"
STUDENT += " --steps 100"
BOTH = "--data.held-out-share 0.02 --eval.samples 1 --eval.sample-tokens 8 --eval.every 1000 --eval.sample-every 1000"
SEEDS = (0, 1, 2)
ALL = {"cross-entropy": 0.5, "forward": 1.0, "reverse": 0.5, "jensen-shannon": 0.5, "hidden": 0.5, "attention": 0.5}


class Case(NamedTuple):
    """A run."""

    weights: dict[str, float] | None = None
    """Of the loss terms, where they are not the defaults."""
    seed: int = 0
    teacher: bool = True
    renormalised: bool = False


KINDS = {
    "text alone": Case(teacher=False),
    "distilled": Case(),
    "renormalised": Case(renormalised=True),
    "all terms": Case(ALL),
    **{f"all but {name}": Case(ALL | {name: 0.0}) for name in ALL},
}
CASES = {f"{kind}, seed {seed}": case._replace(seed=seed) for seed in SEEDS for kind, case in KINDS.items()}


@contextlib.contextmanager
def renormalising() -> Iterator[None]:
    """The target that is usual: what the teacher gives the pieces that both have, made to sum to one."""

    def next_piece(_: Any, before: jax.Array, after: jax.Array, token: jax.Array) -> jax.Array:
        kept = np.load(RUNS / "tokenizer" / TEACHER_PIECES)["kept"]
        return jax.nn.log_softmax(jnp.take(after, kept, axis=0), axis=0)

    with mock.patch.object(divergence, "next_piece", next_piece):
        yield


def trained(folder: Path, arguments: str) -> None:
    """Run `train.py` to its end; whatever the seed is, the documents are held out that the teacher has not read."""
    same_split = functools.partial(data.load_documents, seed=0)
    with mock.patch.object(data, "load_documents", lambda found, _: same_split(found)):
        code = train.main(["--run-dir", str(folder), *arguments.split(), *BOTH.split()])
    if code != 0:
        raise SystemExit(code)


def found(folder: Path) -> dict[str, Any]:
    """What the logbook says at the end of a run."""
    with logbook.connect(folder) as book:
        (bits,) = book.execute("SELECT bits_per_byte FROM evals ORDER BY step DESC LIMIT 1").fetchone()  # type: ignore
        tokens, seconds = book.execute("SELECT sum(tokens), sum(step_seconds) FROM steps").fetchone()  # type: ignore
        # The last tenth, since one step's batch is not another's.
        more = book.execute("SELECT more FROM steps WHERE step > 0.9 * (SELECT max(step) FROM steps)").fetchall()
    rows = [row for (row,) in more]
    said = {name: float(np.mean([row[name] for row in rows])) for name in ("kl", "agreement") if name in rows[0]}
    return {"bits_per_byte": bits, **said, "tokens": int(tokens), "seconds": round(seconds)}


def measure(case: Case) -> dict[str, Any]:
    """The run of a case, and what came of it."""
    teacher = RUNS / "teacher"
    if not (teacher / "metrics").exists() or not _ended(teacher):
        trained(teacher, TEACHER)
    if not (RUNS / "tokenizer").exists():
        run.load(teacher).tokenizer.pruned(2048, RUNS / "tokenizer")
    name = next(name for name, each in CASES.items() if each == case)
    folder = RUNS / name.replace(", ", "-").replace(" ", "-")
    arguments = f"{STUDENT} --seed {case.seed} --tokenizer {RUNS / 'tokenizer'}"
    if case.teacher:
        arguments += f" --teacher {teacher}"
    for term, weight in (case.weights or {}).items():
        arguments += f" --distill.{term} {weight}"
    with renormalising() if case.renormalised else contextlib.nullcontext():
        trained(folder, arguments)
    return found(folder) | {"teacher": found(teacher)["bits_per_byte"]}


def _ended(folder: Path) -> bool:
    with logbook.connect(folder) as book:
        return bool(book.execute("SELECT count(*) FROM evals").fetchone()[0])  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(study(CASES, measure, Path(__file__).with_suffix(".json"), sys.argv[1:]))
