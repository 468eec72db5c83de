"""How close two results must be, in one place."""

import jax
import jax.numpy as jnp
import numpy as np

# Largest error over the largest expected value, by the type of the inputs. bf16 has 8 bits of mantissa: results are
# rounded once (0.4%), gradients also pass through probabilities or products rounded before the last contraction.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def assert_close(actual, expected, dtype, what: str) -> None:
    """Compare pytrees leaf by leaf; a failure prints the largest and the mean error."""
    tolerance = TOLERANCES[jnp.dtype(dtype).name]
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for index, (got, want) in enumerate(pairs):
        assert got.shape == want.shape, f"{what}[{index}]: shape {got.shape}, expected {want.shape}"
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        infinite = np.isinf(want)
        np.testing.assert_array_equal(got[infinite], want[infinite], err_msg=f"{what}[{index}]: infinities")
        error = np.abs(got[~infinite] - want[~infinite])
        if error.size:
            scale = max(np.abs(want[~infinite]).max(), 1e-6)
            assert error.max() <= tolerance * scale, (
                f"{what}[{index}]: largest error {error.max():.3e}, mean {error.mean():.3e}, "
                f"of values up to {scale:.3e}; tolerance {tolerance:.0e} of that"
            )


def normal(seed: int, shape, dtype=jnp.float32) -> jax.Array:
    """Reproducible normal numbers, the same in every type up to rounding."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
