"""A student's embeddings out of its teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vishwamai_eqx.distill import vocabulary_map
from vishwamai_eqx.inheritance import embeddings
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.prune import TeacherPieces

# The pieces are tokens 1, 3, 4, 5, 6 and 8 of the teacher's; two more are of two pieces, and one of none.
KEPT, SEGMENTS = [1, 3, 4, 5, 6, 8], {0: [2, 0], 2: [0, 1], 7: [0, 1, 5]}


def vocabulary():
    segments = [SEGMENTS.get(token) or [KEPT.index(token)] for token in range(9)]
    ends = np.cumsum([len(each) for each in segments], dtype=np.int32)
    pieces = TeacherPieces(np.array(KEPT, np.int32), np.concatenate(segments).astype(np.int32), ends)
    return vocabulary_map(pieces, 10)


def gram(rows):
    rows = np.asarray(rows, np.float64)
    rows = rows - rows.mean(axis=0)
    return rows @ rows.T / np.sum(rows**2)


@pytest.mark.parametrize("width", [3, 4, 6])
def test_inner_products_are_kept_as_well_as_the_width_permits(width):
    keys = jax.random.split(jax.random.key(0), 3)
    own = 0.02 * jax.random.normal(keys[0], (6, width))
    # Of three dimensions but for a little, in a space of five; the mean is far from zero.
    theirs = 5 + jax.random.normal(keys[1], (10, 3)) @ jax.random.normal(keys[2], (3, 5))
    found = jax.jit(embeddings)(own, theirs, vocabulary())
    shared = min(width, 5)
    np.testing.assert_allclose(gram(found[:, :shared]), gram(theirs[jnp.array(KEPT)]), atol=1e-5)
    np.testing.assert_array_equal(found[:, shared:], own[:, shared:])
    np.testing.assert_allclose(jnp.square(found[:, :shared]).mean(), jnp.square(own[:, :shared]).mean(), rtol=1e-5)


def test_on_a_mesh_it_is_the_same():
    mesh, keys = make_mesh({"data": 2, "model": 2}), jax.random.split(jax.random.key(1))
    own, theirs = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (10, 8))
    lies = NamedSharding(mesh, P("model", "data"))
    placed = jax.device_put(own, lies), jax.device_put(theirs, lies)
    found = jax.jit(embeddings, out_shardings=lies)(*placed, vocabulary())
    np.testing.assert_allclose(found, embeddings(own, theirs, vocabulary()), rtol=1e-4, atol=1e-5)
    assert found.sharding == lies
