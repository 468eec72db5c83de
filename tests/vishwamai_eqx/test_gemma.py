"""Gemma beside what `transformers` computed (tests/parity/make_gemma.py), its cache, its folders, their refusals."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from tests.small import rarely
from vishwamai_eqx import attention, engine, gemma, gemma_config, huggingface_model, layers, mesh
from vishwamai_eqx.sampling import Sampling

FOLDERS = Path(__file__).parents[1] / "parity" / "gemma"
FAMILIES = ("gemma", "gemma2", "gemma3")
LOGITS, BLOCKS = 2e-4, 1e-3
GREEDY = Sampling(temperature=0.0)


@functools.cache
def loaded(family):
    return gemma.load(FOLDERS / family)


@functools.cache
def expected(family):
    return dict(np.load(FOLDERS / family / "expected.npz"))


def errors(model, family):
    """The largest error of the logits and of a block's output."""
    logits, hidden = jax.jit(lambda model, tokens: model(tokens, return_hidden=True))(model, expected(family)["tokens"])
    blocks = max(np.abs(mine - its).max() for mine, its in zip(hidden, expected(family)["hidden"], strict=True))
    return np.abs(logits - expected(family)["logits"]).max(), blocks


def earlier(described):
    """A config.json in the dialect of transformers 4."""
    described = dict(described)
    described["torch_dtype"] = described.pop("dtype")
    rope = described.pop("rope_parameters")
    if "full_attention" in rope:
        full, local = rope["full_attention"], rope["sliding_attention"]
        described |= {"rope_theta": full["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
        described["rope_scaling"] = {"rope_type": "linear", "factor": full["factor"]}
        described["sliding_window_pattern"] = described.pop("_sliding_window_pattern", 6)
    else:
        described["rope_theta"] = rope["rope_theta"]
    described.pop("layer_types", None)
    if "hidden_act" in described:
        # As the first files on the hub have it.
        described["hidden_act"] = "gelu"
    return described


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_blocks_are_those_of_transformers(family):
    logits, blocks = errors(loaded(family), family)
    assert logits < LOGITS and blocks < BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_say_the_same(family, tmp_path):
    described = json.loads((FOLDERS / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(earlier(described)))
    assert gemma_config.read(tmp_path) == loaded(family).decoder.config


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_through_the_cache_goes_on_past_the_window(family):
    prompts = [[int(token) for token in row] for row in expected(family)["prompt"]]
    text = engine.generate(loaded(family).decoder, prompts, max_new_tokens=20, eos_id=-1, sampling=GREEDY)
    np.testing.assert_array_equal(text, expected(family)["greedy"])


def test_rings_of_rows_of_any_length_hold_what_full_passes_see():
    model, rng = loaded("gemma3"), np.random.default_rng(0)
    prompts = [rng.integers(4, 96, length).tolist() for length in (1, 7, 8, 9, 16, 21)]
    text = engine.generate(model.decoder, prompts, max_new_tokens=12, eos_id=-1, sampling=GREEDY)
    rings = model.decoder.new_cache(1, 64).period
    assert [cache.ring for cache in rings] == [True] * 5 + [False] and rings[0].length == 8
    whole = jax.jit(lambda tokens: jnp.argmax(model(tokens), axis=-1))
    for prompt, row in zip(prompts, text, strict=True):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(prompt) + len(row)] = prompt + row
        likeliest = np.asarray(whole(padded))[0, len(prompt) - 1 :]
        np.testing.assert_array_equal(likeliest[: len(row)], row)


@pytest.mark.parametrize("sizes", [rarely({"data": 2}), rarely({"model": 2}), {"data": 2, "model": 4}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_mesh_each_device_reads_its_slices(family, sizes):
    devices = mesh.make_mesh(sizes)
    specs = mesh.place(loaded(family).decoder, sizes)
    shardings = jax.tree.map(lambda spec: NamedSharding(devices, spec), specs)
    model = gemma.load(FOLDERS / family, shardings=shardings)
    pieces = {leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(model)}
    assert max(pieces) == math.prod(sizes.values())

    def logits(decoder, tokens):
        hidden, _, _ = decoder(tokens, placement=specs)
        return mesh.gather(decoder, specs, jnp.float32).head(hidden)

    rows = PartitionSpec("data" if "data" in sizes else None)
    out = PartitionSpec(*rows, None, "model" if "model" in sizes else None)
    whole = jax.jit(jax.shard_map(logits, mesh=devices, in_specs=(specs, rows), out_specs=out))
    assert np.abs(whole(model.decoder, expected(family)["tokens"]) - expected(family)["logits"]).max() < LOGITS


def exact_gelu(monkeypatch, model):
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", lambda x: jax.nn.gelu(x, approximate=False))
    return model


def missing_one(monkeypatch, model):
    called = layers.RMSNorm.__call__

    def without(norm, x):
        return called(eqx.tree_at(lambda norm: norm.weight, norm, norm.weight - 1), x)

    monkeypatch.setattr(layers.RMSNorm, "__call__", without)
    return model


def longer_window(monkeypatch, model):
    options = attention.TPUMultiHeadAttention.pattern_options

    def longer(self, *arguments):
        return {name: value + 1 if name == "window" else value for name, value in options(self, *arguments).items()}

    monkeypatch.setattr(attention.TPUMultiHeadAttention, "pattern_options", longer)
    return model


def reconfigured(**changes):
    def plant(_, model):
        config = dataclasses.replace(model.decoder.config, **changes)
        other = gemma.Decoder(config, key=jax.random.key(0))
        arrays = jax.tree.leaves(model)
        return gemma.Gemma(jax.tree.unflatten(jax.tree.structure(other), arrays))

    return plant


FAULTS = {
    "an exact GELU": (exact_gelu, "gemma"),
    "no 1 + w": (missing_one, "gemma"),
    "a window too long by one": (longer_window, "gemma2"),
    "a wrong scale of q": (reconfigured(query_pre_attn_scalar=16), "gemma2"),
    "no cap on scores": (reconfigured(attn_logit_softcapping=None), "gemma2"),
    "no cap on logits": (reconfigured(final_logit_softcapping=None), "gemma2"),
    "one base of rotary positions": (reconfigured(rope_local_theta=1e6), "gemma3"),
    "positions that are not divided": (reconfigured(rope_factor=1.0), "gemma3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault, monkeypatch):
    plant, family = FAULTS[fault]
    logits, _ = errors(plant(monkeypatch, loaded(family)), family)
    assert logits > LOGITS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_the_one_that_was_loaded(family, tmp_path, monkeypatch):
    dtype = ml_dtypes.bfloat16 if family == "gemma2" else np.float32
    # In several files.
    monkeypatch.setattr(huggingface_model, "SHARD_BYTES", 20_000)
    gemma.save(gemma.load(FOLDERS / family, dtype), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in load_file(FOLDERS / family / "model.safetensors").items():
        np.testing.assert_array_equal(weights.pop(name).view(np.uint8), tensor.view(np.uint8))
    assert not weights
    was, is_now = (json.loads((folder / "config.json").read_text()) for folder in (FOLDERS / family, tmp_path))
    not_ours = {"transformers_version", "use_cache", "initializer_range", "_sliding_window_pattern"}
    for name, value in was.items():
        if name not in not_ours:
            assert is_now.get(name) == value, name
    assert gemma_config.read(tmp_path) == loaded(family).decoder.config
    again = gemma.load(tmp_path, dtype)
    assert all(map(np.array_equal, *(jax.tree.leaves(model) for model in (gemma.load(FOLDERS / family, dtype), again))))


def test_an_untied_head_and_half_precision_files_are_read(tmp_path):
    shutil.copytree(FOLDERS / "gemma", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = np.random.default_rng(0).normal(size=tensors["model.embed_tokens.weight"].shape)
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(tensors | {"lm_head.weight": head.astype(np.float16)}, tmp_path / "model.safetensors")
    described = json.loads((tmp_path / "config.json").read_text())
    # As in transformers, a head that is not the embedding's is the model's, whatever the configuration says.
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": tied}))
        untied = gemma.load(tmp_path).decoder.untied_head
        assert untied is not None
        np.testing.assert_array_equal(untied.weight, head.astype(np.float16).astype(np.float32))
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert gemma.load(tmp_path).decoder.untied_head is None


def described_as(tmp_path, content):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return gemma_config.read(tmp_path)


def test_what_a_file_leaves_out_is_its_familys(tmp_path):
    """The hub's file of a Gemma 3 that sees says no more of its text than this; sizes are those of transformers."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = described_as(tmp_path, {"model_type": "gemma3", "text_config": text})
    assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (262_208, 256, 131_072)
    assert (config.num_attention_heads, config.num_key_value_heads, config.period) == (8, 4, 6)
    assert (config.rope_theta, config.rope_factor) == (1e6, 8.0)
    assert (config.rope_local_theta, config.rope_local_factor) == (1e4, 1.0)


SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "head_dim": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "rope", "full", "sliding"),
    [
        ("gemma2", {"rope_parameters": LINEAR}, (1e4, 4.0), (1e4, 4.0)),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": LINEAR}}, (1e6, 1.0), (1e4, 4.0)),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, (1e6, 1.0), (1e4, 1.0)),
        ("gemma3_text", {"rope_theta": None, "rope_local_base_freq": 5e3}, (1e6, 1.0), (5e3, 1.0)),
    ],
)
def test_rotary_positions_of_full_and_of_sliding_layers(model_type, rope, full, sliding, tmp_path):
    config = described_as(tmp_path, {"model_type": model_type, **SHAPE, **rope})
    assert (config.rope_theta, config.rope_factor) == full
    assert (config.rope_local_theta, config.rope_local_factor) == sliding
    assert described_as(tmp_path, gemma_config.describe(config, "float32")) == config


def test_what_training_elsewhere_reads_is_written_again(tmp_path):
    given = {"eos_token_id": [1, 106], "initializer_range": 0.05, "use_cache": False}
    config = described_as(tmp_path, {"model_type": "gemma3_text", **SHAPE, **given})
    written = gemma_config.describe(config, "float32")
    assert {name: written[name] for name in given} == given


IMPOSSIBLE = {
    "num_hidden_layers": ("8", 8.0, 10**9, None, True),
    "hidden_size": (None, 10**400),
    "head_dim": (None,),
    "layer_types": (5, [[]] * 6, [1] * 6),
    "sliding_window": (None, 0),
    "sliding_window_pattern": ("x", 2.5, -1),
    "rope_parameters": ("x", [1], {"full_attention": "x"}, {"rope_theta": 0}, {"partial_rotary_factor": 0.5}),
    "rope_scaling": ([1], {"type": "linear"}, {"type": "linear", "factor": "x"}, {"type": "linear", "factor": 0}),
    "rope_theta": ("x", [1], -1.0),
    "eos_token_id": ([], ["a"]),
    "model_type": ([], {}, None),
    "hidden_activation": ("gelu", ["gelu"], {"a": 1}),
    "rms_norm_eps": (0, -1.0, float("nan")),
    "final_logit_softcapping": (0.0, -5.0, float("nan")),
    "attn_logit_softcapping": (50.0,),
    "query_pre_attn_scalar": (0, 2.5),
    "max_position_embeddings": (0,),
    "tie_word_embeddings": (1, "yes"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_are_refused_with_file_and_name(name, tmp_path):
    for value in IMPOSSIBLE[name]:
        with pytest.raises(ValueError, match=r"config\.json: .") as refused:
            described_as(tmp_path, {"model_type": "gemma3_text", **SHAPE, name: value})
        assert name in str(refused.value) or name.startswith("rope"), value
    with pytest.raises(ValueError, match=r"config\.json: not readable"):
        described_as(tmp_path, "[" * 100_000)


def described(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def shards(placed):
    def index(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / huggingface_model.INDEX).write_text(json.dumps({"weight_map": placed}))

    return index


def header(content):
    def write(folder):
        (folder / "model.safetensors").write_bytes(content)

    return write


def claim(size):
    text = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


REFUSED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: not readable"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable"),
    "another model": (described(model_type="llama"), "model_type='llama' must be one of gemma, gemma2, gemma3_text"),
    "another activation": (described(hidden_act="silu"), "hidden_activation='silu' must be"),
    "biases": (described(attention_bias=True), "attention_bias=True must be False"),
    "a number in words": (described(hidden_size="32"), "hidden_size='32' must be of type int"),
    "nothing": (described(vocab_size=0), "vocab_size=0 must be at least 1"),
    "odd head": (described(head_dim=15), "head_dim=15 must be even"),
    "heads": (described(num_key_value_heads=3), "num_key_value_heads=3 must divide num_attention_heads=4; take one of"),
    "another rotary scaling": (described(rope_parameters={"rope_type": "yarn"}), "rope_type='yarn' must be"),
    "layers": (described(num_hidden_layers=4), "no tensor 'model.layers.3"),
    "fewer layers": (described(num_hidden_layers=2), "has no place in the model that config.json describes"),
    "vocabulary": (
        described(vocab_size=95),
        "model.embed_tokens.weight has shape [96, 32], config.json means [95, 32]",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a missing tensor": (weights(lambda tensors: tensors.pop("model.norm.weight")), "no tensor 'model.norm.weight'"),
    "a wrong dtype": (
        weights(lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int32)})),
        "model.norm.weight has dtype I32, not one of F32, F16, BF16",
    ),
    "a missing shard": (
        shards({"a": "model-00002-of-00002.safetensors"}),
        "model-00002-of-00002.safetensors is missing",
    ),
    "a file elsewhere": (
        shards({"a": "../../etc/passwd"}),
        "names '../../etc/passwd', which is not a file of this folder",
    ),
    "a name too long for a file": (shards({"a": "x" * 5000}), "is missing, which model.safetensors.index.json names"),
    "an index of nothing": (shards([]), "not an index of safetensors files"),
    "a truncated header": (header(b"\x10\0\0\0\0\0\0\0{"), "model.safetensors: damaged or incomplete"),
    "a header as long as memory": (header(b"\xff" * 8 + b"{}"), "model.safetensors: damaged or incomplete"),
    "a tensor beyond the file": (header(claim(1 << 40)), "model.safetensors: damaged or incomplete"),
    "an empty file": (header(b""), "model.safetensors: damaged or incomplete"),
}


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(FOLDERS / "gemma", folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / "b.safetensors")
    (folder / huggingface_model.INDEX).write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"b\.safetensors: holds model.norm.weight, which .*a\.safetensors holds too"):
        gemma.load(folder)


def test_saving_leaves_nothing_of_what_was_there(tmp_path, monkeypatch):
    """Neither one file beside several nor an index of others: the last weights saved are those that are read."""
    first = loaded("gemma")
    second = eqx.tree_at(lambda it: it.decoder.norm.weight, first, first.decoder.norm.weight + 1)
    for size, saved in ((10_000, first), (huggingface_model.SHARD_BYTES, second), (10_000, first)):
        monkeypatch.setattr(huggingface_model, "SHARD_BYTES", size)
        gemma.save(saved, tmp_path)
        np.testing.assert_array_equal(gemma.load(tmp_path).decoder.norm.weight, saved.decoder.norm.weight)
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / huggingface_model.INDEX).exists()


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_whole_is_refused_by_name(case, tmp_path):
    change, sentence = REFUSED[case]
    folder = tmp_path / "gemma"
    shutil.copytree(FOLDERS / "gemma", folder)
    change(folder)
    with pytest.raises(ValueError) as refusal:
        gemma.load(folder)
    assert sentence in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_truncated_file_is_refused(tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(FOLDERS / "gemma", folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        gemma.load(folder)
