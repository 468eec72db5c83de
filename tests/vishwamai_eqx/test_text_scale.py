"""Text at a size where memory would show: what is held does not grow with the corpus."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "text.py"


@pytest.mark.slow
def test_memory_does_not_follow_the_corpus_and_a_warm_start_is_quick():
    spec = importlib.util.spec_from_file_location("text_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    small, large = benchmark.main(10), benchmark.main(90)
    growth = large["cold"]["anonymous_mb"] - small["cold"]["anonymous_mb"]
    # 80 MB more text, at the slope that keeps ten gigabytes under one, and what two runs differ by.
    assert growth < 0.08 * 80 + 25, (small, large)
    assert large["warm"]["index_seconds"] + large["warm"]["tokenize_seconds"] < 1.8
    assert large["cold"]["padding"] < 0.03
