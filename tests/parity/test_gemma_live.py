"""Gemma beside `transformers` itself, where torch is installed: other seeds, and folders that were saved here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vishwamai_eqx import engine, gemma
from vishwamai_eqx.sampling import Sampling

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.parity import make_gemma  # noqa: E402


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", make_gemma.CASES)
@pytest.mark.filterwarnings("ignore")
def test_another_seed_agrees_and_a_saved_folder_loads_there(family, seed, tmp_path):
    make_gemma.make(tmp_path, family, seed)
    expected, model = np.load(tmp_path / "expected.npz"), gemma.load(tmp_path)
    logits, hidden = jax.jit(lambda tokens: model(tokens, return_hidden=True))(jnp.asarray(expected["tokens"]))
    assert np.abs(logits - expected["logits"]).max() < 2e-4
    assert max(np.abs(mine - its).max() for mine, its in zip(hidden, expected["hidden"], strict=True)) < 1e-3
    prompts = [row.tolist() for row in expected["prompt"]]
    greedy = Sampling(temperature=0.0)
    text = engine.generate(model.decoder, prompts, max_new_tokens=20, eos_id=-1, sampling=greedy)
    np.testing.assert_array_equal(text, expected["greedy"])

    gemma.save(model, tmp_path / "saved")
    kind = make_gemma.CASES[family][0]
    first, second = (kind.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path, tmp_path / "saved"))
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
    ours = second.config.to_dict()
    for name, value in first.config.to_dict().items():
        assert name in ("dtype", "_name_or_path") or ours[name] == value, name
