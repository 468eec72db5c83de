"""Gemma in the training step: what `train.py --init` does, from its folder to a folder again."""

import dataclasses
import functools
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import generate
import train
from tests.small import random_batch, rarely, small, worst
from tests.test_train import run
from vishwamai_eqx import architecture, command_line, evaluation, export, flops, gemma, nonfinite, parameters
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.tokenizer import VishwamAITokenizer

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
KINDS = ("sliding_attention", "full_attention", "sliding_attention")
# The last layer of each comes after the last whole period.
FAMILIES = {
    "gemma2": GemmaConfig("gemma2", num_hidden_layers=3, layer_types=KINDS, final_logit_softcapping=3.0, **SIZES),
    "gemma3_text": GemmaConfig("gemma3_text", num_hidden_layers=3, layer_types=KINDS, rope_factor=8.0, **SIZES),
}


def tuned(family, microbatches=1):
    gemma_config = FAMILIES[family]
    optim = {"clip_norm": 0.5, "microbatches": microbatches, "learning_rate": 1e-2}
    config = small(optim=optim, **gemma_config.model_settings, remat="full")
    return dataclasses.replace(config, gemma=gemma_config)


one = functools.cache(lambda family: run(tuned(family), {}, 5, "float64"))


@pytest.mark.parametrize(
    ("family", "mesh", "microbatches"),
    [
        ("gemma2", {"data": 2, "model": 2}, 2),
        rarely("gemma2", {"data": 8}, 1),
        rarely("gemma2", {}, 4),
        rarely("gemma3_text", {"data": 2, "model": 4}, 1),
    ],
    ids=str,
)
def test_meshes_and_microbatches_do_not_change_the_losses(family, mesh, microbatches):
    with jax.enable_x64(True):
        expected, _ = one(family)
        found, _ = run(tuned(family, microbatches), mesh, 5, "float64")
        assert worst(expected, found) < 1e-9
        losses = [float(metrics.loss) for metrics in found]
        assert abs(losses[0] - np.log(96)) < 0.5 and len(set(losses)) == 5


def test_the_loss_is_that_of_its_logits():
    config = tuned("gemma2")
    model = architecture.build(config, "float32", jax.random.key(0))
    model = eqx.tree_at(lambda model: model.embedding.weight, model, 10 * model.embedding.weight)
    batch = jax.tree.map(jnp.asarray, random_batch(8, 16, 0))
    hidden, _, _ = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
    logits = model.head(hidden)
    assert 2.9 < jnp.abs(logits).max() <= 3
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    devices = make_mesh({})
    specs = jax.tree.map(lambda _: train.P(), model)
    found, tokens = evaluation.make_evaluate(train.token_loss, devices, specs)(model, batch)
    np.testing.assert_allclose(found, jnp.sum(nll * (batch.segment_ids > 0)), rtol=1e-5)
    assert tokens == (batch.segment_ids > 0).sum()


@pytest.mark.parametrize("layer", range(3))
def test_a_layer_that_is_not_finite_is_named(layer):
    def spoil(state):
        place = (lambda s: s.model.rest[0]) if layer == 2 else (lambda s: s.model.period[layer])
        broken = lambda s: place(s).mlp_norm.weight  # noqa: E731
        return eqx.tree_at(broken, state, broken(state) * jnp.nan)

    metrics, _ = run(tuned("gemma2"), {"data": 2}, 1, "float32", spoil)
    assert nonfinite.first(metrics[0].broken, float("nan")) == f"the output of layer {layer}"


@pytest.mark.parametrize("family", FAMILIES)
def test_hand_count_of_parameters(family):
    abstract = jax.eval_shape(lambda: architecture.build(tuned(family), "float32", jax.random.key(0)))
    assert flops.parameters(tuned(family)) == (parameters.count(abstract),) * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Gemma 2 whose vocabulary is padded, and its tokenizer; and text."""
    root = tmp_path_factory.mktemp("fine")
    lines = [f"def f{n}(x):\n    return x + {n * n}\n" for n in range(400)]
    (root / "text").mkdir()
    for n in range(40):
        (root / "text" / f"{n}.py").write_text("".join(lines[n * 10 : n * 10 + 10]))
    VishwamAITokenizer.train(["".join(lines)], 300, root / "small-gemma")
    config = dataclasses.replace(FAMILIES["gemma2"], vocab_size=320, max_position_embeddings=64)
    gemma.save(gemma.Gemma(gemma.Decoder(config, key=jax.random.key(0))), root / "small-gemma")
    return root / "small-gemma"


def settings(folder, run_dir, steps):
    tuning = "--optim.learning-rate 3e-3 --optim.warmup-steps 1 --eval.samples 2 --eval.sample-tokens 8"
    text = ["--init", str(folder), "--run-dir", str(run_dir), "--data", str(folder.parent / "text" / "*.py")]
    return [*text, "--model.max-seq-len", "32", *tuning.split(), "--steps", str(steps)]


def held_out(out):
    return float(out.split("held-out bits per byte: ")[1].split()[0])


def test_a_folder_is_fine_tuned_and_exported(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(settings(folder, "run", 1)) == 0
    before = held_out(capsys.readouterr().out)
    assert train.main(settings(folder, "tuned", 12)) == 0
    after = held_out(capsys.readouterr().out)
    assert after < before - 0.5
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert saved["gemma"]["final_logit_softcapping"] == 3.0 and saved["model"]["vocab_size"] == 320
    # It goes on without the folder.
    assert train.main(["--run-dir", "tuned"]) == 0
    assert held_out(capsys.readouterr().out) == after

    export.export(tmp_path / "tuned", tmp_path / "out")
    capsys.readouterr()
    arguments = ["--prompt", "def", "--max-new-tokens", "6", "--temperature", "0"]
    assert generate.main(["--run-dir", "tuned", *arguments]) == 0
    written = capsys.readouterr().out
    assert generate.main(["--model", "out", *arguments]) == 0
    assert capsys.readouterr().out == written
    assert "gemma2 fine-tuned" in (tmp_path / "out" / "README.md").read_text()
    assert gemma.load("out").decoder.config == gemma.load(folder).decoder.config


def test_what_begins_is_the_folder(folder, tmp_path):
    config = command_line.parse(settings(folder, tmp_path / "run", 1))
    assert (config.optim.learning_rate, config.model.num_experts, config.tokenizer) == (3e-3, 1, folder)
    _, current = run(config, {}, 0, "float32")
    expected = gemma.load(folder).decoder
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(current.model), jax.tree.leaves(expected))


def test_refusals_before_anything_is_compiled(folder, tmp_path, capsys):
    def refused(folder, *arguments):
        with jax.log_compiles(), jax.checking_leaks():
            assert train.main([*settings(folder, tmp_path / "run", 1), *arguments]) == 2
        assert not (tmp_path / "run" / "config.json").exists()
        return capsys.readouterr().err

    assert "num_layers=4 must be 3, as in" in refused(folder, "--model.num-layers", "4")
    assert "max_seq_len=128 must be at most the 64" in refused(folder, "--model.max-seq-len", "128")
    assert "dropout_rate=0.1 must be 0.0" in refused(folder, "--model.dropout-rate", "0.1")
    assert "nowhere/config.json: not readable" in refused(tmp_path / "nowhere")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    shutil.copytree(folder.parent / "text", tmp_path / "text")
    assert "neither model.safetensors nor" in refused(broken)
    (broken / "tokenizer.model").unlink()
    assert "tokenizer" in refused(broken)
