"""What tests of the TPU compiler share: they are slow, and need it.

Programs for a TPU that is not there are compiled each time: jax can write them to its cache and not read them.
"""

import importlib.util
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

NO_COMPILER = importlib.util.find_spec("libtpu") is None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Asked before `-m` chooses."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(
                pytest.mark.skipif(NO_COMPILER, reason="no libtpu here: pip install 'jax[tpu]' on x86-64 Linux")
            )


@pytest.fixture(autouse=True)
def no_compilation_cache():
    # Whether there is a cache is asked once and remembered until a reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
