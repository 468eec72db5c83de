"""Which topologies there are, and what is said of the others."""

import importlib.util

import pytest

from kernels import topology
from kernels.tpu import GENERATIONS
from vishwamai_eqx.flops import PEAK_FLOPS


@pytest.mark.parametrize("name", [*topology.EXAMPLES, "v3:32x32", "v5p:4x8x8", "v3:16x16", "v5p:28x16x20", "v4:2x2x1"])
def test_topologies_are_counted_as_the_compiler_counts_them(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu here")
    found = topology.devices(name)
    assert len(found) == topology.count(name)
    assert found[0].device_kind == topology.parse(name)[0].device_kind


def test_the_table_has_eight_devices_of_each_generation_and_its_figures():
    assert [topology.count(name) for name in topology.EXAMPLES] == [8] * len(GENERATIONS)
    for it in GENERATIONS.values():
        assert PEAK_FLOPS[it.device_kind] == it.peak_flops
        assert it.vmem < it.hbm < 2**37
        assert it.ici_bandwidth < it.hbm_bandwidth < it.peak_flops


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v9:2x2", "must be NAME:SHAPE with a name of v2, v3, v4, v5e, v5p, v6e, tpu7x; take "),
        ("7x:2x2x1", "take tpu7x:2x2x1."),
        ("V3:2x2", "take v3:2x2."),
        ("", "take v3:2x2."),
        ("v3", "topology='v3' must have AxB chips, A and B even, of at most 32x32; take v3:2x2."),
        ("v3:2x2x2", "must have AxB chips"),
        ("v4:2x2", "must have AxBxC chips, A and B even, of at most 16x16x16; take v4:2x2x2."),
        ("v3:3x3", "A and B even"),
        ("v3:0x2", "A and B even"),
        ("v3:-2x2", "A and B even"),
        ("v3:2x", "A and B even"),
        ("v3:2x2 ", "A and B even"),
        ("v3:64x64", "of at most 32x32"),
        ("v5e:99999999x2", "of at most 16x16"),
    ],
)
def test_others_are_refused_in_a_sentence(name, sentence):
    with pytest.raises(ValueError) as refusal:
        topology.count(name)
    assert sentence in str(refusal.value)
    assert repr(name) in str(refusal.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the TPU compiler.*pip install 'jax\[tpu\]'"):
        topology.devices("v3:2x2")
