"""A teacher in the training step: what `train.py --teacher` does, and what it refuses."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import train
from tests.histories import stored, text
from tests.small import worst
from vishwamai_eqx import (
    command_line,
    data,
    export,
    gemma,
    inheritance,
    load,
    logbook,
    optim,
    policy,
    prune,
    run,
    state,
    teaching,
)
from vishwamai_eqx.config import parse_mesh, to_dict
from vishwamai_eqx.feed import place
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.tokenizer import VishwamAITokenizer

SIZES = {"hidden_size": 24, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 352, "max_position_embeddings": 64}
STUDENT = "--model.vocab-size=304 --model.hidden-size=32 --model.num-layers=2 --model.num-heads=2 --model.num-experts=2"
STUDENT += " --model.ffn-dim=32 --model.max-seq-len=32 --model.num-kv-heads=2 --precision=f32 --optim.warmup-steps=1"
STUDENT += " --eval.rows=8 --eval.samples=2 --eval.sample-tokens=8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Gemma whose logits are capped, whose vocabulary is padded and larger than the student's; and text."""
    root = tmp_path_factory.mktemp("distilling")
    (root / "text").mkdir()
    text(root / "text")
    VishwamAITokenizer.train(sorted((root / "text").glob("*.txt")), 330, root / "gemma")
    config = GemmaConfig("gemma2", final_logit_softcapping=20.0, **SIZES)
    gemma.save(gemma.Gemma(gemma.Decoder(config, key=jax.random.key(0))), root / "gemma")
    return root / "gemma"


def settings(folder, run_dir, *more):
    where = ["--teacher", str(folder), "--run-dir", str(run_dir), "--data", str(folder.parent / "text" / "*.txt")]
    return [*where, *STUDENT.split(), *more]


def test_a_student_learns_of_its_teacher_and_does_a_step_again(folder, tmp_path, capsys):
    terms = "--distill.reverse 0.5 0 --distill.jensen-shannon 0 0.5 --distill.temperature 2"
    terms = f"{terms} --distill.hidden 1 --distill.attention 1 --distill.inherit".split()
    assert train.main(settings(folder, tmp_path / "run", "--steps", "6", *terms)) == 0
    student = VishwamAITokenizer(tmp_path / "run" / "tokenizer")
    assert student.vocab_size == 304 and (tmp_path / "run" / "tokenizer" / prune.TEACHER_PIECES).exists()
    with logbook.connect(tmp_path / "run") as book:
        rows = [row for (row,) in book.execute("SELECT more FROM steps ORDER BY step").fetchall()]
        loss, tokens = book.execute("SELECT loss, tokens FROM steps WHERE step = 1").fetchone()
    dataset = dataset_of(command_line.parse(["--run-dir", str(tmp_path / "run")]), student)
    in_bytes = dataset.source_bytes(dataset.batch(0))
    assert rows[0]["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / in_bytes, rel=1e-5)
    for row in rows:
        assert {"forward", "reverse", "jensen_shannon", "kl", "agreement", "hidden", "attention"} <= row.keys()
        assert all(row[name] > 0 for name in ("forward", "reverse", "jensen_shannon", "kl", "attention"))
        assert 0 <= row["agreement"] <= 1
    assert rows[-1]["kl"] < rows[0]["kl"] and rows[-1]["hidden"] < rows[0]["hidden"]
    vocabulary = teaching.vocabularies(command_line.parse(["--run-dir", str(tmp_path / "run")]), student).of_teacher
    begun = inheritance.embeddings(jnp.ones((304, 32)), gemma.load(folder).decoder.embedding.weight, vocabulary)
    moved = stored(tmp_path / "run", 6)["model/embedding/weight"]
    assert np.corrcoef(moved[:, :24].ravel(), begun[:, :24].ravel())[0, 1] > 0.8
    # Projections are the run's, not the model's.
    assert stored(tmp_path / "run", 6)["model/projections/weight"].shape == (2, 32, 24)
    export.export(tmp_path / "run", tmp_path / "out")
    assert load(tmp_path / "out").model.projections is load(tmp_path / "run").model.projections is None
    capsys.readouterr()
    assert train.main(["--run-dir", str(tmp_path / "run"), "--replay", "5"]) == 0
    assert capsys.readouterr().out.count("agrees bit for bit") == 3
    # Another teacher of the same shape in its place.
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copytree(folder.parent / "text", tmp_path / "text")
    decoder = gemma.load(other).decoder
    gemma.save(gemma.Gemma(jax.tree.map(lambda leaf: leaf + 1, decoder)), other)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**saved, "teacher": str(other)}))
    assert train.main(["--run-dir", str(tmp_path / "run")]) == 2
    assert "the teacher has changed in mid-run" in capsys.readouterr().err


def dataset_of(config, tokenizer, cache_dir=None):
    corpus = data.load_documents(config.data, config.seed, cache_dir)
    length, rows = config.model.max_seq_len, config.optim.batch_size
    return data.prepare(corpus, tokenizer, seq_len=length, batch_size=rows, seed=config.seed, cache_dir=cache_dir)


def test_a_student_with_its_own_tokenizer_learns_of_layers(folder, tmp_path, capsys):
    own = VishwamAITokenizer.train(["def other function names, and more words: xyz"] * 9, 304, tmp_path / "own")
    assert any(piece not in VishwamAITokenizer(folder).piece_bytes for piece in own.piece_bytes)
    more = "--steps 4 --distill.forward 0 --distill.hidden 1 --distill.attention 1"
    assert train.main(settings(folder, tmp_path / "run", "--tokenizer", str(tmp_path / "own"), *more.split())) == 0
    assert VishwamAITokenizer(tmp_path / "run" / "tokenizer").fingerprint == own.fingerprint
    with logbook.connect(tmp_path / "run") as book:
        rows = [row for (row,) in book.execute("SELECT more FROM steps ORDER BY step").fetchall()]
    assert {"hidden", "attention", "bits_per_byte"} <= rows[0].keys() and rows[0].keys().isdisjoint({"kl", "forward"})
    assert rows[-1]["hidden"] < rows[0]["hidden"] and rows[-1]["attention"] > 0


def test_a_student_writes_and_its_teacher_says_what_is_next(folder, tmp_path, capsys):
    assert train.main(settings(folder, tmp_path / "run", "--steps", "4", "--distill.on-policy", "2")) == 0
    capsys.readouterr()
    # From the beginning, since there is no checkpoint before: step 2 is written again.
    assert train.main(["--run-dir", str(tmp_path / "run"), "--replay", "4"]) == 0
    assert capsys.readouterr().out.count("agrees bit for bit") == 3
    config, student = command_line.parse(["--run-dir", str(tmp_path / "run")]), load(tmp_path / "run")
    rows = teaching.rows(dataset_of(config, student.tokenizer), config)
    batch, text = policy.written(rows, 1, student.model), rows.student.batch(1)
    assert not any(np.array_equal(a, b) for a, b in zip(batch.tokens, text.tokens, strict=True))
    for row in range(len(batch.tokens)):
        opening = min(8, int((text.segment_ids[row] == 1).sum()))
        np.testing.assert_array_equal(batch.tokens[row, :opening], text.tokens[row, :opening])
        written = int(batch.segment_ids[row].sum())
        np.testing.assert_array_equal(batch.targets[row, : written - 1], batch.tokens[row, 1:written])
        for token, end in enumerate(batch.places[row].tolist()):
            if end >= 0:
                mine = student.tokenizer.decode_bytes(batch.tokens[row, : end + 1])
                assert mine == rows.teacher.decode_bytes(batch.teacher_tokens[row, : token + 1])
    assert (batch.places >= 0).sum() > 0.2 * batch.segment_ids.sum()


@pytest.mark.slow
def test_of_its_own_text_a_student_learns_only_what_the_teacher_says(folder, tmp_path):
    norms = []
    for weight, every in ((0.5, 1), (0, 1), (0.5, 0), (0, 0)):
        run_dir = tmp_path / f"{weight}-{every}"
        more = f"--steps 1 --distill.on-policy {every} --distill.cross-entropy {weight}".split()
        assert train.main(settings(folder, run_dir, *more)) == 0
        with logbook.connect(run_dir) as book:
            norms.append(book.execute("SELECT grad_norm FROM steps").fetchone()[0])
    assert norms[0] == norms[1] and len(set(norms)) == 3


def steps(folder, tmp_path, mesh, microbatches, *terms):
    """Three steps in f64; what they say and the last state."""
    more = "--distill.reverse 0.5 0 --distill.temperature 2 --distill.hidden 0.5"
    more += f" --distill.student-layers 1 2 --distill.teacher-layers 2 2 --optim.microbatches {microbatches}"
    more = [*more.split(), *terms]
    config = command_line.parse(settings(folder, tmp_path / "run", *more))
    run.make_tokenizer(config, data.load_documents(config.data, config.seed, tmp_path), teaching.tokenizer(config))
    student = run.tokenizer_of(tmp_path / "run", config)
    dataset = dataset_of(config, student, tmp_path)
    devices, transform = make_mesh(parse_mesh(mesh, 8)), optim.optimizer(config.optim)
    vocabularies = teaching.vocabularies(config, student)
    step, (abstract, _, *wanted) = train.abstract_step(config, devices, "float64", vocabularies)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    current = state.initialise(config, "float64", transform, shardings)
    current = jax.tree.map(lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf, current)
    tutor, said = teaching.load(config, wanted, vocabularies), []
    for n in range(3):
        rows = place(teaching.rows(dataset, config), n, NamedSharding(devices, train.MICROBATCHES), microbatches)
        current, metrics = step(current, rows, *tutor)
        said.append(jax.device_get((metrics.loss, metrics.grad_norm, metrics.told)))
    return said, jax.device_get(current.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches", "more"),
    [("data=2,expert=2,model=2", 2, ["--distill.attention", "0.5"]), ("data=4,expert=2", 1, [])],
)
def test_meshes_and_microbatches_do_not_change_what_is_learned(folder, tmp_path, mesh, microbatches, more):
    with jax.enable_x64(True):
        expected = steps(folder, tmp_path / "one", "data=1", 1, *more)
        found = steps(folder, tmp_path / "eight", mesh, microbatches, *more)
    assert worst(expected, found) < 1e-9


@pytest.mark.slow
def test_a_run_and_its_export_teach_alike(folder, tmp_path):
    glob = str(folder.parent / "text" / "*.txt")
    larger = [each for each in STUDENT.split() if "vocab" not in each]
    teaching_run = ["--run-dir", str(tmp_path / "teacher"), "--data", glob, *larger, "--model.vocab-size", "330"]
    assert train.main([*teaching_run, "--steps", "2"]) == 0
    export.export(tmp_path / "teacher", tmp_path / "exported")
    (tmp_path / "text").symlink_to(folder.parent / "text")
    said = []
    for name in ("teacher", "exported"):
        run_dir = tmp_path / f"of-{name}"
        assert train.main(settings(tmp_path / name, run_dir, "--steps", "2", "--distill.hidden", "1")) == 0
        with logbook.connect(run_dir) as book:
            said.append(book.execute("SELECT loss, more['kl'], more['hidden'] FROM steps ORDER BY step").fetchall())
    assert said[0] == said[1] and said[0][0][1] > 0


def test_refusals_before_anything_is_compiled(folder, tmp_path, capsys):
    def refused(*arguments):
        with jax.log_compiles():
            assert train.main(settings(folder, tmp_path / "run", *arguments)) == 2
        assert not (tmp_path / "run" / "config.json").exists()
        return capsys.readouterr().err

    own = VishwamAITokenizer.train(["def other function names, and more words: xyz"] * 9, 304, tmp_path / "own")
    assert own.vocab_size == 304
    error = refused("--tokenizer", str(tmp_path / "own"))
    assert "which the teacher lacks" in error and "tokenizer prune TEACHER.model --size 304" in error
    assert "learn of its layers alone: --distill.forward 0 --distill.hidden 1" in error
    assert "take 3" in refused("--model.vocab-size", "340")
    assert "vocab_size=400 must be at most the 352" in refused("--model.vocab-size", "400")
    assert "max_seq_len=128 must be at most the 64" in refused("--model.max-seq-len", "128")
    assert "distill.forward=(-1.0,) must be one weight" in refused("--distill.forward", "-1")
    assert "distill.temperature=0.0 must be above 0" in refused("--distill.temperature", "0")
    assert "distill.beta=1.0 must be above 0 and below 1" in refused("--distill.beta", "1")
    assert "student_layers=(1, 3) must be from 1 to the 2" in refused(*["--distill.student-layers", "1", "3"])
    assert "teacher_layers=(0,) must be from 1 to the 2" in refused(*["--distill.teacher-layers", "0"])
    assert "teacher_layers=(1, 2) must be 1 layers" in refused(
        *["--distill.student-layers", "1", "--distill.teacher-layers", "1", "2"]
    )
    assert "relation_heads=5 must be a divisor of" in refused(
        *["--distill.attention", "1", "--distill.relation-heads", "5"]
    )
    assert "must be 0 unless the mesh's model=2 divides the 1 relation heads" in refused(
        *["--distill.attention", "1", "--mesh", "data=4,model=2", "--distill.relation-heads", "1"]
    )
    assert "must be 0 unless the mesh's model=4 divides the 2 key and value heads of the teacher" in refused(
        *["--distill.attention", "1", "--mesh", "data=2,model=4"]
    )
    assert "must be above 0 where nothing else is learned of the teacher" in refused("--distill.forward", "0")
    assert "must be 0 where the last of the layers is the first" in refused(
        *["--distill.attention", "1", "--distill.student-layers", "1", "--distill.teacher-layers", "2"]
    )
    assert "must be given without init" in refused("--init", str(folder))
    assert "nowhere' must be a Gemma folder or a run" in refused("--teacher", str(tmp_path / "nowhere"))
    assert "must be a folder outside of dry runs" in refused("--teacher", "gemma-7b")
    fresh = shutil.copytree(folder, tmp_path / "fresh", ignore=shutil.ignore_patterns("model*"))
    run_of_it = to_dict(command_line.parse(["--init", str(folder), "--run-dir", str(tmp_path / "none")]))
    (fresh / "config.json").write_text(json.dumps(run_of_it))
    shutil.copytree(fresh, fresh / "tokenizer")
    assert "must have a good checkpoint" in refused("--teacher", str(fresh))
    prefixed = shutil.copytree(folder, tmp_path / "prefixed")
    proto = VishwamAITokenizer(folder).proto
    proto.normalizer_spec.add_dummy_prefix = True
    (prefixed / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert "its tokenizer changes text before it cuts it" in refused("--teacher", str(prefixed))
