"""Pieces drawn from the teacher's target in its place: the loss that they give, and the folder they are in."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import train
from tests.histories import text
from vishwamai_eqx import draw_targets, draws, gemma, logbook, targets
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.tokenizer import VishwamAITokenizer

PIECES, BATCH, SEQ, WIDTH = 24, 2, 7, 8


def example(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden, weight = jax.random.normal(keys[0], (BATCH, SEQ, WIDTH)), jax.random.normal(keys[1], (PIECES, WIDTH))
    q = jax.nn.log_softmax(2 * jax.random.normal(keys[2], (PIECES, BATCH * SEQ)), axis=0)
    mask = (jax.random.uniform(keys[3], (BATCH, SEQ)) < 0.7).astype(jnp.float32)
    return hidden, weight, q, mask


def full(hidden, weight, q, mask, softcap):
    """The divergence of the full distributions, and where both hold one piece for the likeliest."""
    logits = jnp.einsum("bsd,vd->vbs", hidden, weight).reshape(PIECES, -1)
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    divergence = (jnp.exp(q) * (q - jax.nn.log_softmax(logits, axis=0))).sum(axis=0)
    agreement = logits.argmax(axis=0) == q.argmax(axis=0)
    return jnp.sum(divergence * mask.reshape(-1)), jnp.sum(agreement * mask.reshape(-1))


def by_draws(hidden, weight, found, mask, softcap):
    drawn, likeliest, entropy = (each.reshape(*each.shape[:-1], BATCH, SEQ) for each in found)
    return draws.drawn_divergence(hidden, weight, drawn, likeliest, entropy, mask, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_on_average_over_draws_the_loss_and_its_gradients_are_those_of_the_full_target(softcap):
    hidden, weight, q, mask = example()

    def one(key):
        found = draws.draw(q, 4, key)
        value = jax.value_and_grad(lambda h, w: by_draws(h, w, found, mask, softcap), (0, 1), has_aux=True)
        return value(hidden, weight)

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2000))
    (loss, closeness), gradients = jax.tree.map(lambda each: np.asarray(each, np.float64), drawn)
    (wanted, agreement), expected = jax.value_and_grad(full, (0, 1), has_aux=True)(hidden, weight, q, mask, softcap)
    np.testing.assert_array_equal(closeness.agreement, agreement)
    np.testing.assert_allclose(closeness.kl, loss)
    error = loss.std() / np.sqrt(len(loss))
    # The four likeliest pieces, renormalised, are another target, and so is their mass alone.
    kept = jnp.where(q >= jnp.sort(q, axis=0)[-4], q, -jnp.inf)
    top = jnp.maximum(jax.nn.log_softmax(kept, axis=0), -1e30)
    biased = float(full(hidden, weight, top, mask, softcap)[0])
    print(f"by draws {loss.mean():.4f}, its standard error {error:.4f}, full {wanted:.4f}, top four {biased:.4f}")
    assert abs(loss.mean() - wanted) < 3 * error < 0.1 * abs(biased - wanted)
    for found, value in zip(gradients, expected, strict=True):
        off = np.abs(found.mean(axis=0) - value) / np.maximum(found.std(axis=0) / np.sqrt(len(found)), 1e-7)
        assert np.mean(off**2) < 1.5 and off.max() < 6


def test_given_draws_values_and_gradients_are_the_plain_ones_in_any_chunks(monkeypatch):
    hidden, weight, q, mask = example(1)
    found = draws.draw(q, 3, jax.random.key(2))
    drawn, _, entropy = found

    def plain(hidden, weight):
        s = jax.nn.log_softmax(jnp.einsum("bsd,vd->vbs", hidden, weight).reshape(PIECES, -1), axis=0)
        taken = s[drawn, jnp.arange(BATCH * SEQ)].mean(axis=0)
        return jnp.sum((-taken - entropy) * mask.reshape(-1))

    value, wanted = jax.value_and_grad(plain, (0, 1))(hidden, weight)
    for chunk in (1, 4, 128):
        monkeypatch.setattr(draws, "CHUNK_TOKENS", chunk)
        run = jax.value_and_grad(lambda h, w: by_draws(h, w, found, mask, None)[0], (0, 1))
        ours, gradients = jax.jit(run)(hidden, weight)
        np.testing.assert_allclose(ours, value, rtol=1e-6)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


def test_a_divided_vocabulary_gives_the_same():
    hidden, weight, q, mask = example(2)
    found = draws.draw(q, 3, jax.random.key(3))
    mesh = make_mesh({"model": 2})

    def run(hidden, weight, found, mask):
        return jax.value_and_grad(lambda h, w: by_draws(h, w, found, mask, 5.0), (0, 1), has_aux=True)(hidden, weight)

    specs, outs = (P(), P("model"), P(), P()), ((P(), P()), (P(), P("model")))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=True))
    wanted, got = run(hidden, weight, found, mask), sharded(hidden, weight, found, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


def test_draws_come_as_often_as_they_are_probable():
    q = jnp.log(jnp.array([[0.5, 0.0], [0.3, 1.0], [0.2, 0.0]]))
    # What is impossible has no logarithm here.
    q = jnp.maximum(q, jnp.log(jnp.finfo(jnp.float32).tiny))
    drawn, likeliest, entropy = draws.draw(q, 10_000, jax.random.key(0))
    shares = np.stack([(drawn == piece).mean(axis=0) for piece in range(3)])
    np.testing.assert_allclose(shares, jnp.exp(q), atol=1e-3)
    assert likeliest.tolist() == [0, 1]
    np.testing.assert_allclose(entropy, [-(np.log([0.5, 0.3, 0.2]) @ [0.5, 0.3, 0.2]), 0], atol=1e-6)


SIZES = {"hidden_size": 24, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 352, "max_position_embeddings": 64}
STUDENT = "--model.vocab-size=304 --model.hidden-size=32 --model.num-layers=1 --model.num-heads=2 --model.num-experts=1"
STUDENT += " --model.ffn-dim=32 --model.max-seq-len=32 --model.num-kv-heads=2 --precision=f32 --eval.rows=8"
STUDENT += " --eval.samples=2 --eval.sample-tokens=8 --steps=3 --distill.draws=64"


def test_a_run_reads_what_was_put_down_and_is_refused_what_is_of_others(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    text(tmp_path / "text")
    VishwamAITokenizer.train(sorted((tmp_path / "text").glob("*.txt")), 330, tmp_path / "gemma")
    config = GemmaConfig("gemma2", final_logit_softcapping=20.0, **SIZES)
    gemma.save(gemma.Gemma(gemma.Decoder(config, key=jax.random.key(0))), tmp_path / "gemma")
    folder = tmp_path / "targets"

    def settings(*more):
        where = ["--teacher", str(tmp_path / "gemma"), "--data", str(tmp_path / "text" / "*.txt")]
        return [*where, *STUDENT.split(), *more]

    def of_cache(*more):
        return settings("--run-dir", str(tmp_path / "run"), "--distill.targets", str(folder), *more)

    def refused(*more):
        with jax.log_compiles():
            assert train.main(of_cache(*more)) == 2
        return capsys.readouterr().err

    assert "make them with python -m vishwamai_eqx.draw_targets" in refused()
    assert draw_targets.main(of_cache()) == 0
    assert "3 batches, 3 of them made now" in capsys.readouterr().out
    whole = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    (folder / "00000001.npy").unlink()
    assert "must hold the run's 3 batches and has 1" in refused()
    assert draw_targets.main(of_cache()) == 0
    assert "1 of them made now" in capsys.readouterr().out
    assert whole == {path.name: path.read_bytes() for path in folder.glob("*.npy")}

    assert train.main(of_cache()) == 0
    assert train.main(settings("--run-dir", str(tmp_path / "online"))) == 0
    said = []
    for name in ("run", "online"):
        with logbook.connect(tmp_path / name) as book:
            said.append(book.execute("SELECT loss, more FROM steps ORDER BY step").fetchall())
    (loss, drawn), (online_loss, asked) = said[0][0], said[1][0]
    assert loss == online_loss and drawn["agreement"] == pytest.approx(asked["agreement"], abs=1e-6)
    assert drawn["kl"] == drawn["forward"] == pytest.approx(asked["kl"], rel=0.05) and drawn["kl"] > 0
    capsys.readouterr()
    assert train.main(["--run-dir", str(tmp_path / "run"), "--replay", "2"]) == 0
    assert capsys.readouterr().out.count("agrees bit for bit") == 3
    shutil.rmtree(tmp_path / "run")

    for more in (["--seed", "1"], ["--data.held-out-share", "0.3"]):
        assert "must be of this run's data" in refused(*more) and draw_targets.main(of_cache(*more)) == 2
        assert "in another folder" in capsys.readouterr().err
    assert "must be of this run's draws, 8, and is of 64" in refused("--distill.draws", "8")
    assert "must be of this run's tokenizer" in refused("--model.vocab-size", "310")
    for term in ("reverse", "hidden"):
        assert f"distill.{term}=(1.0,) must be 0 with distill.targets" in refused(f"--distill.{term}", "1")
    assert "temperature=2.0 must be 1 with distill.targets" in refused("--distill.temperature", "2")
    decoder = gemma.load(tmp_path / "gemma").decoder
    changed = eqx.tree_at(lambda tree: tree.embedding.weight, decoder, replace_fn=lambda leaf: leaf + 1)
    gemma.save(gemma.Gemma(changed), tmp_path / "gemma")
    assert "must be of this run's teacher" in refused()
    assert json.loads((folder / targets.HEADER).read_text())["draws"] == 64
