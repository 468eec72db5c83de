"""Programs for a TPU that is not there are compiled each time: jax can write them to its cache and not read them."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def no_compilation_cache():
    # Whether there is a cache is asked once and remembered until a reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
