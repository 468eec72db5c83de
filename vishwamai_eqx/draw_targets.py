"""A teacher's targets for a run's batches, to be read in its place: the run's own settings, and where to put them.

    python -m vishwamai_eqx.draw_targets --teacher gemma-7b --distill.targets targets --data 'texts/*.md' --steps 1000
    python train.py                      --teacher gemma-7b --distill.targets targets --data 'texts/*.md' --steps 1000

What is there already is kept: the same command goes on where it stopped.
"""

import dataclasses
import json
import math
import sys

import vishwamai_eqx  # noqa: F401  isort: skip  (before jax, whose platform it chooses)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Int32

from vishwamai_eqx import command_line, data, targets, teacher, teaching
from vishwamai_eqx.cache import locked, replaced
from vishwamai_eqx.config import BATCH_AXES, Config, ProcessesConfig, parse_mesh
from vishwamai_eqx.data import PairedBatch
from vishwamai_eqx.divergence import CHUNK_TOKENS, Softness, target, with_last
from vishwamai_eqx.draws import draw
from vishwamai_eqx.feed import place
from vishwamai_eqx.mesh import gather, index, make_mesh, on_mesh
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.tokenizer import VishwamAITokenizer
from vishwamai_eqx.validation import problems

P = PartitionSpec


def make_draw(config: Config, mesh: Mesh, tutors: teaching.Tutor) -> jax.stages.Wrapped:
    """From a teacher that lies so, a paired batch and its number to what is drawn where the teacher's tokens end.

    Of each token the likeliest piece, the bits of the entropy, and the pieces that are drawn.
    """

    def of_rows(tutor: teaching.Tutor, batch: PairedBatch, key: Array) -> Int32[Array, "found batch seq"]:
        assert tutor.model is not None and tutors.model is not None and tutor.vocabularies.of_teacher is not None
        vocabulary, softness = tutor.vocabularies.of_teacher, Softness(teacher_softcap=tutor.model.softcap)
        theirs, *_ = tutor.model(
            batch.teacher_tokens,
            segment_ids=batch.teacher_segment_ids,
            positions=batch.teacher_positions,
            placement=tutors.model,
        )
        head = gather(tutor.model.head_weight, tutors.model.head_weight, theirs.dtype).weight
        read, shape = batch.teacher_tokens.reshape(-1), batch.teacher_tokens.shape
        chunk = min(CHUNK_TOKENS, len(read))
        chunks = math.ceil(len(read) / chunk)
        more = chunks * chunk - len(read)

        def some(xs: tuple[Array, Array, Array]) -> Array:
            theirs, read, number = xs
            q = target(theirs, head, read, vocabulary, softness)
            drawn, likeliest, entropy = draw(q, config.distill.draws, jax.random.fold_in(key, number))
            bits = jax.lax.bitcast_convert_type(entropy.astype(jnp.float32), jnp.int32)
            return jnp.concatenate([likeliest[None], bits[None], drawn])

        theirs = jnp.pad(theirs.reshape(len(read), -1), ((0, more), (0, 0))).reshape(chunks, chunk, -1)
        parts = with_last(theirs), jnp.pad(read, (0, more)).reshape(chunks, chunk), jnp.arange(chunks)
        found = jnp.moveaxis(jax.lax.map(some, parts), 0, 1)
        return found.reshape(len(found), -1)[:, : len(read)].reshape(-1, *shape)

    def all_rows(tutor: teaching.Tutor, batch: PairedBatch, number: Int[Array, ""]) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), index(*BATCH_AXES))
        keys = jax.random.split(key, len(batch.tokens))
        return jax.lax.map(lambda xs: of_rows(tutor, *xs), (batch, keys))

    microbatches = on_mesh(P(None, BATCH_AXES), mesh)
    out = on_mesh(P(None, None, BATCH_AXES), mesh)
    sharded = jax.shard_map(all_rows, mesh=mesh, in_specs=(tutors, microbatches, P()), out_specs=out, check_vma=True)
    return jax.jit(sharded)


def by_piece(
    found: Int32[np.ndarray, "found batch seq"], places: Int[np.ndarray, "batch seq"]
) -> Int32[np.ndarray, "found batch seq"]:
    """The same where the student's pieces are; -1 for the likeliest one where no token of the teacher's ends."""
    row, column = np.nonzero(places >= 0)
    lying = np.zeros_like(found)
    lying[0] = -1
    lying[:, row, places[row, column]] = found[:, row, column]
    return lying


def make(config: Config) -> int:
    """Compute and write those of the run's batches that the folder has not yet, and say how many they are."""
    folder = config.distill.targets
    if config.teacher is None or folder is None or not config.distill.of_pieces:
        raise ValueError(
            "distill.targets must be given with a teacher whose pieces are learned; take --teacher DIR "
            "--distill.targets DIR."
        )
    online = dataclasses.replace(config, distill=dataclasses.replace(config.distill, targets=None))
    corpus = data.load_documents(config.data, config.seed)
    with locked(folder):
        if config.tokenizer is None:
            student = teacher.tokenizer(config.teacher).pruned(config.model.vocab_size, folder / "tokenizer")
        else:
            student = VishwamAITokenizer(config.tokenizer)
        vocabularies = teaching.vocabularies(online, student)
        dataset = data.prepare(
            corpus,
            student,
            seq_len=config.model.max_seq_len,
            batch_size=config.optim.batch_size,
            seed=config.seed,
        )
        rows = teaching.rows(dataset, online)
        assert isinstance(rows, Pairs)
        if not (folder / targets.HEADER).exists():
            with replaced(folder / targets.HEADER) as temporary:
                temporary.write_text(json.dumps(targets.header(config, rows.fingerprints)) + "\n")
        # What is there already is of the same, or this is refused.
        targets.check(dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=0)), rows.fingerprints)
        missing = [n for n in range(config.optim.steps) if not targets.path(folder, n).exists()]
        on, microbatches = make_mesh(parse_mesh(config.mesh, jax.device_count())), config.optim.microbatches
        wanted = teaching.abstract(online, on, compute_dtype(config.precision), vocabularies)
        (tutor,) = teaching.load(online, wanted, vocabularies)
        run = make_draw(online, on, jax.tree.map(lambda leaf: leaf.sharding.spec, wanted[0]))
        for n in missing:
            batch = place(rows, n, NamedSharding(on, P(None, BATCH_AXES)), microbatches)
            assert isinstance(batch, PairedBatch)
            found = np.asarray(run(tutor, batch, jnp.int32(n)))
            found = np.moveaxis(found, 0, 1).reshape(found.shape[1], -1, rows.seq_len)
            with replaced(targets.path(folder, n)) as temporary, temporary.open("wb") as file:
                np.save(file, by_piece(found, np.asarray(batch.places).reshape(-1, rows.seq_len)))
    print(f"{folder}: {config.optim.steps} batches, {len(missing)} of them made now")
    return 0


def impossible(config: Config) -> list[str]:
    """What cannot be of the settings here."""
    found = problems(config, jax.device_count(), jax.default_backend())
    if not found and parse_mesh(config.mesh, jax.device_count())["model"] > 1:
        found.append(f"mesh={config.mesh!r} must not divide the vocabulary, which is drawn from as a whole; take auto.")
    if config.processes != ProcessesConfig():
        found.append("processes.count must not be given: targets are drawn by one process; leave it out.")
    return found


def main(argv: list[str]) -> int:
    """The exit code of the program with those arguments."""
    try:
        return make(command_line.parse(argv, __doc__, impossible))
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
