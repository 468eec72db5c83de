"""Eight virtual CPU devices, reproducible hypothesis, and a compilation cache, set before jax is imported."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised code compiles two to three times faster, and these tests compile much and compute little.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if version("jaxlib").startswith("0.10."):
    # Its emitters lower each fusion by itself: three quarters of the time that it takes to compile a step. Later
    # versions have no others.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What a second run of the suite would compile again is read from disk.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vishwamai-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis

hypothesis.settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("default")
