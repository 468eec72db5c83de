"""Mistakes in the TPU kernels, one at a time, each of which the shared suites have to notice."""

import inspect
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from kernels.flash_attention import pallas_backward, pallas_forward, pallas_scores, pallas_tables
from kernels.flash_attention import pallas_tpu as attention_tpu
from kernels.gemm import fp8, quantize
from kernels.gemm import pallas_tpu as gemm_tpu
from kernels.grouped_matmul import blocks, visits, words
from kernels.grouped_matmul import pallas_tpu as grouped_tpu
from kernels.moe_dispatch import pallas_tpu as moves
from tests.kernels import test_experts as experts
from tests.kernels import test_flash_attention as attention
from tests.kernels import test_grouped_visits as visited
from tests.kernels import test_quantize as rounding
from tests.kernels import test_scaled_matmul as scaled

pytestmark = pytest.mark.slow

# What is wrong: (case of the suite, module, what stands there, what stands there instead)
ATTENTION = {
    "window off by one": ("window only", pallas_scores, "behind < settings.window", "behind <= settings.window"),
    "diagonal off by one": ("causal", pallas_scores, "behind >= -ahead", "behind > -ahead"),
    "a key of padding": ("window only", pallas_scores, "key < block.kv_len - kv_start", "key < block.kv_len + 9"),
    "segments in order": ("segments", pallas_scores, "queries.slice] == across", "queries.slice] >= across"),
    "another key's dropout": (
        "dropout",
        pallas_scores,
        "dropout.column_word(jnp.arange(",
        "dropout.column_word(1 + jnp.arange(",
    ),
    "a lost block": ("causal", pallas_tables, "seen & (last_q + offset >= first_k)", "seen & (first_q > first_k)"),
    "a block masked too little": ("causal", pallas_tables, "first_q + offset >= last_k", "first_q + offset >= first_k"),
    "missing rescale": ("causal", pallas_forward, "sum_ref[:, queries] * rescale", "sum_ref[:, queries]"),
    "total not rescaled": ("causal", pallas_forward, "total_ref[:, queries] * rescale", "total_ref[:, queries]"),
    "wrong scale": ("causal", pallas_backward, "dq_sum[...] * settings.scale", "dq_sum[...] * settings.scale**2"),
    "another logarithm": ("causal", attention_tpu, "lse * LOG2_E)", "lse)"),
    "slope of the cap": ("window, softcap, scale", pallas_backward, "1 - capped * capped", "1 - capped"),
    "dropout forgotten backward": ("dropout", pallas_backward, "jnp.where(keep, probabilities, 0.0)", "probabilities"),
    "a head's gradient alone": ("causal", pallas_backward, "(head == 0) & (step == 0)", "step == 0"),
}
EXPERTS = {
    "a lost row": ("ragged", words, "(index + part < high)", "(index + part < high - 1)"),
    "the next group's row": ("ragged", visits, "jnp.append(ends, tiles * tile)", "jnp.append(ends + 1, tiles * tile)"),
    "an empty group's gradient": ("empty groups", grouped_tpu, "out_ref[...] = jnp.zeros_like(out_ref)", "pass"),
}
LAYER = {
    "weights forgotten": (moves, "rows_ref[...] * scale)", "rows_ref[...])"),
    "the first choice's row": (moves, "index[step * count + slot]", "index[step * count]"),
    "the last token's row": (moves, "plan.position, g, weights.dtype", "plan.position[::-1], g, weights.dtype"),
}
SCALED = {
    "the first scale of a row": ("fp8 in blocks", "x_scales[:, part : part + 1]", "x_scales[:, :1]"),
    "the first scale of a column": (
        "int8 in blocks",
        "w_scales_ref[part : part + 1, columns]",
        "w_scales_ref[:1, columns]",
    ),
    "partial sums lost": ("fp8 tensors", "jnp.where(k_i == 0, 0.0, scratch[0][:, columns])", "0.0"),
    "the first scales of k": ("bf16 and int8 in blocks", "return 0 if uniform else k_i", "return 0"),
    "a block's scale for all columns": ("bf16 and int8 columns", "(step(k_i), 0, n_i)", "(step(k_i), 0, 0)"),
}
ROUNDING = {
    "scales that do not reach": ("e4m3", quantize, "(bits + 0x7FFFFF)", "bits"),
    "digits cut off": ("int8", quantize, "jnp.round(inside)", "jnp.trunc(inside)"),
    "float's largest of int8": ("int8", quantize, "largest.astype(jnp.float32) / it.largest", "largest / 448"),
}


def mutate(monkeypatch, module, old, new):
    """Replace the module's functions by those of its changed source, wherever in `kernels` they are used."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} has no {old!r} any more: say the mistake in today's words"
    changed = types.ModuleType(module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, changed)  # what dataclasses look their types up in
    exec(compile(source.replace(old, new), module.__file__, "exec"), changed.__dict__)
    users = [it for name, it in list(sys.modules.items()) if name.startswith("kernels.")] + [module]
    for name, original in list(vars(module).items()):
        mine = getattr(original, "__module__", None) == module.__name__
        if callable(original) and mine and not inspect.isclass(original):
            for user in users:
                replace(monkeypatch, vars(user), original, getattr(changed, name))
        elif not name.startswith("__"):
            # Its types are those that others check for, and what a test made small stays small.
            setattr(changed, name, original)


def replace(monkeypatch, names, old, new):
    """Also in the tables of implementations."""
    for name, value in list(names.items()):
        if value is old:
            monkeypatch.setitem(names, name, new)
        elif isinstance(value, dict) and any(it is old for it in value.values()):
            replace(monkeypatch, value, old, new)


@pytest.mark.parametrize("mistake", ATTENTION)
def test_attention_with_a_mistake_fails_its_suite(mistake, monkeypatch):
    name, *change = ATTENTION[mistake]
    attention.shrink(monkeypatch, "pallas_tpu")
    fails(monkeypatch, change, attention.test_value_and_gradients_match_the_reference, name, "pallas_tpu")


@pytest.mark.parametrize("mistake", EXPERTS)
def test_a_grouped_product_with_a_mistake_fails_its_suite(mistake, monkeypatch):
    name, *change = EXPERTS[mistake]
    monkeypatch.setattr(blocks, "ROWS", (16,))
    fails(monkeypatch, change, experts.test_grouped_matmul_matches_ragged_dot, name, "pallas_tpu", jnp.float32)


@pytest.mark.parametrize("mistake", LAYER)
def test_a_layer_with_a_mistake_fails_its_suite(mistake, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", (16,))
    test = experts.test_the_whole_layer_matches_every_expert_for_every_token
    fails(monkeypatch, LAYER[mistake], test, "pallas_tpu", "zipf")


def test_a_gradient_of_the_last_tile_alone_fails_its_suite(monkeypatch):
    change = grouped_tpu, "jnp.where(first, 0.0, sum_ref[...])", "0.0"
    fails(monkeypatch, change, visited.test_several_blocks_of_every_axis, False, None, monkeypatch)


@pytest.mark.parametrize("mistake", SCALED)
def test_a_scaled_product_with_a_mistake_fails_its_suite(mistake, monkeypatch):
    name, *change = SCALED[mistake]
    scaled.small_blocks(monkeypatch)
    test = scaled.test_the_product_of_scaled_numbers
    fails(monkeypatch, (gemm_tpu, *change), test, name, "pallas_tpu", monkeypatch)


@pytest.mark.parametrize("mistake", ROUNDING)
def test_rounding_with_a_mistake_fails_its_suite(mistake, monkeypatch):
    name, *change = ROUNDING[mistake]
    fails(monkeypatch, change, rounding.test_an_outlier_costs_what_the_format_says, name)


def test_gradients_of_the_forward_format_fail_their_suite(monkeypatch):
    fails(monkeypatch, (fp8, "(g, E5M2)", "(g, E4M3)"), scaled.test_gradients_reach_as_far_as_e5m2)


def fails(monkeypatch, change, test, *arguments):
    mutate(monkeypatch, *change)
    jax.clear_caches()
    with pytest.raises(AssertionError, match=r"largest error|infinities"):
        test(*arguments)
    jax.clear_caches()
