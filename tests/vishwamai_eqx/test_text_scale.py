"""The text pipeline at a size where starting cold takes a while."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "text.py"


@pytest.mark.slow
def test_a_warm_start_is_quick_and_little_is_padding_or_memory():
    spec = importlib.util.spec_from_file_location("text_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    large = benchmark.main(90)
    assert large["warm"]["index_seconds"] + large["warm"]["tokenize_seconds"] < 1.8
    assert large["cold"]["padding"] < 0.03
    # What does not grow with the corpus; what does is in the test of its memory.
    assert large["cold"]["anonymous_mb"] < 250
