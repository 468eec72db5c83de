"""The training step through the TPU compiler: what fits, what it multiplies and exchanges, beside the estimates."""

import functools
import json
from typing import Any

import pytest

import train
from vishwamai_eqx import command_line, flops
from vishwamai_eqx.config import PRESETS, Config

# Small, but scanned, rematerialised and sharded as the large ones are; of an inner width that fills registers, as what
# kernels pad it by they multiply too.
SMALL = (
    "--preset tiny --model.vocab-size 1024 --model.ffn-dim 256 --model.remat full --model.scan-unroll 1 "
    "--optim.batch-size 32"
)


def dry_run(capsys, topology: str, arguments: str) -> dict[str, Any]:
    """The report of a dry run, whose exit code has to say whether it fits."""
    code = train.main(["--dry-run", "--json", "--topology", topology, *arguments.split()])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["fits"] else 3)
    assert found["fits"] == (found["hbm"]["peak"] <= found["hbm"]["capacity"])
    return found


def check(found: dict[str, Any], layer_weights: int, layers: int) -> None:
    """The bounds that hold on every generation; `layer_weights` are the numbers of all layers' parameters."""
    per_token, moved = found["flops_per_token"], found["collective_bytes"]
    assert per_token["compiler"] == pytest.approx(per_token["hand"], rel=0.03)
    outside = found["parameters"]["total"] - layer_weights
    # Each layer's weights at most twice, the embedding once, all in bf16.
    assert moved["all-gather"] <= 2 * (2 * layer_weights + outside)
    # Two layers and the embedding at once, at most.
    assert found["gathered_at_once"] <= 2 * (2 * layer_weights / layers + outside)
    # An all-reduce is what small vectors need; on the wire it counts twice.
    gradients = moved["all-to-all"] + moved.get("reduce-scatter", 0) + 2 * moved["all-reduce"]
    assert gradients <= 1.05 * 2 * found["parameters"]["total"] * found["batch"]["microbatches"]
    assert found["roofline"]["seconds"] > 0
    assert 0 < found["roofline"]["mfu"] < 1


def layer_weights(config: Config) -> int:
    """Numbers of the compute type that all layers' weights are; a router's are f32, and count twice."""
    model = config.model
    outside = (model.vocab_size + 2) * model.hidden_size
    return flops.parameters(config)[0] - outside + model.num_layers * model.hidden_size * model.num_experts


@functools.cache
def small_weights() -> tuple[int, int]:
    config = command_line.parse(SMALL.split())
    return layer_weights(config), config.model.num_layers


# v3 has no reduce-scatter and no bf16 products; the slow table has every other generation.
@pytest.mark.parametrize("topology", ["v3:2x2", "v5e:2x4"])
def test_a_small_step(topology, capsys):
    found = dry_run(capsys, topology, SMALL)
    assert found["fits"]
    check(found, *small_weights())


def test_the_products_of_fp8_are_counted(capsys):
    """They are a kernel's, of which the compiler says nothing; key and value are as wide as its blocks here."""
    found = dry_run(capsys, "v5e:2x4", f"{SMALL} --model.num-kv-heads 2 --precision fp8")["flops_per_token"]
    assert found["compiler"] == pytest.approx(found["hand"], rel=0.03)


def test_flops_grow_with_the_layers(capsys):
    few, many = (dry_run(capsys, "v5e:2x4", f"{SMALL} --model.num-layers {n}")["flops_per_token"] for n in (4, 8))
    grown = many["compiler"] - few["compiler"]
    assert grown == pytest.approx(many["hand"] - few["hand"], rel=0.03)


def test_an_offloaded_optimiser_takes_little_hbm(capsys):
    """But for what of it is being updated, a third of a model of experts."""
    large = f"{SMALL} --optim.batch-size 8 --model.num-layers 16 --model.hidden-size 256 --model.ffn-dim 1024"
    apart, here = (dry_run(capsys, "v5e:2x4", f"{large} {option}")["hbm"] for option in ("--offload", "--no-offload"))
    assert apart["optimizer"] == 0
    assert here["peak"] - apart["peak"] >= here["optimizer"] / 2


# Rows of 2,048 tokens on each device: what has to fit, in 16 GB and more. A compile takes minutes; every generation,
# and what is larger, is in tests/studies/topologies.py.
BASE = {"v3:2x2": 4, "v6e:2x4": 4}


@pytest.mark.parametrize("topology", BASE)
def test_base_fits_every_generation(topology, capsys):
    rows = 8 * BASE[topology]
    found = dry_run(capsys, topology, f"--preset base --optim.batch-size {rows}")
    assert found["fits"]
    assert found["batch"]["rows_per_device"] == BASE[topology]
    assert found["hbm_by_hand"]["peak"] == pytest.approx(found["hbm"]["peak"], rel=0.15)
    check(found, layer_weights(PRESETS["base"]), PRESETS["base"].model.num_layers)
