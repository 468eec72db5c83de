"""Where parameters lie on a mesh, and which meshes are refused."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.small import MIXED, small
from vishwamai_eqx.architecture import build
from vishwamai_eqx.config import AXES, parse_mesh
from vishwamai_eqx.mesh import gather, make_mesh, place
from vishwamai_eqx.validation import problems


def abstract(**model):
    return jax.eval_shape(lambda: build(small(**model), "float32", jax.random.key(0)))


def test_every_axis_divides_what_is_declared_for_it():
    spec = place(abstract(tie_embeddings=False), {"replica": 1, **MIXED})
    shards = ("data", "expert")
    assert spec.embedding.weight == spec.untied_head.weight == P(("model", *shards))
    attention, experts = spec.blocks.attention, spec.blocks.experts
    # Stored [d_model, width], and where there are fewer features than that [width, d_model].
    assert attention.query.weight == P(None, shards, "model")
    assert attention.key.weight == attention.value.weight == P(None, ("model", *shards))
    assert attention.out.weight == P(None, ("model", *shards))
    assert experts.gate == experts.up == experts.down == P(None, "expert", "data", "model")
    assert experts.router.weight == P(None, shards)
    assert spec.norm.scale == spec.blocks.experts_norm.bias == P()


def test_fewer_key_heads_than_devices_are_on_all_of_them():
    spec = place(abstract(), {"data": 2, "model": 4})
    assert spec.blocks.attention.key.weight == P(None, "data")
    assert spec.blocks.attention.query.weight == P(None, "data", "model")


def test_shards_hold_whole_tiles_where_they_can():
    spec = place(abstract(hidden_size=48, ffn_dim=512), {"data": 2, "model": 2})
    assert spec.blocks.experts.gate == P(None, None, None, ("model", "data"))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"expert": 3}, "mesh expert=3 must divide the experts, which are 8; take another size"),
        ({"model": 5}, "mesh model=5 must divide the parts of vocab, which are 96"),
    ],
)
def test_what_does_not_divide_is_refused_when_placed(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(abstract(), sizes)


# What a tokenizer has at least, with a byte each.
PIECES = {"vocab_size": 320}


@pytest.mark.parametrize(
    ("mesh", "model", "sentence"),
    [
        ("model=8", {}, "model.num_heads=4 must be a multiple of the mesh's model=8; take mesh model=4."),
        ("model=2", {"ffn_dim": 25}, "model.ffn_dim=25 must be a multiple of the mesh's model=2; take mesh model=1."),
        ("expert=3", {}, "model.num_experts=8 must be a multiple of the mesh's expert=3; take mesh expert=2."),
        (
            "model=4",
            {"num_heads": 12, "num_kv_heads": 6, "hidden_size": 48},
            "model.num_kv_heads=6 must be a multiple or a divisor of the mesh's model=4; take 4.",
        ),
        (
            "replica=2,data=2,expert=2",
            {},
            "optim.batch_size=12 must be a multiple of microbatches=1 times the mesh's replica * data * expert = 8; "
            "take 16.",
        ),
    ],
)
def test_a_mesh_that_the_model_does_not_fit_is_refused(mesh, model, sentence):
    batch = 12 if "replica" in mesh else 24
    config = dataclasses.replace(small(optim={"batch_size": batch}, **PIECES, **model), mesh=mesh)
    assert problems(config, 8) == [sentence]


def test_a_dense_model_takes_an_expert_axis_as_more_of_data():
    dense = small(num_experts=1, experts_per_token=1, **PIECES)
    assert problems(dataclasses.replace(dense, mesh="expert=8"), 8) == []
    assert place(abstract(num_experts=1), {"data": 2, "expert": 2}).blocks.experts.gate.weight == P(
        None, ("data", "expert")
    )


def test_mesh_settings():
    assert parse_mesh("data=2,expert=2,model=2", 8) == {"replica": 1, **MIXED}
    assert parse_mesh("auto", 8) == {"replica": 1, "data": 8, "expert": 1, "model": 1}
    assert make_mesh({"model": 2}).shape == {**dict.fromkeys(AXES, 1), "model": 2}
    with pytest.raises(ValueError, match="must be AXIS=SIZE with an axis of replica, data, expert, model"):
        parse_mesh("tensor=2", 8)


def test_outside_a_mesh_only_the_cast_happens():
    cast = jax.eval_shape(lambda: gather(build(small(), "float32", jax.random.key(0)), None, "bfloat16"))
    assert cast.blocks.experts.gate.dtype == "bfloat16" and cast.blocks.experts.router.weight.dtype == "float32"
