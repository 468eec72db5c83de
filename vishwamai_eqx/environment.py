"""What has to be set before jax is imported: the platform, and how glibc hands out memory."""

import ctypes
import importlib.util
import os
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
"""When this package began to be imported: what a program's start-up is counted from."""

# glibc's mallopt: the numbers are those of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def choose_platform() -> None:
    """Keep jax from looking for a TPU that is not there.

    An installed libtpu makes jax ask a metadata server for a TPU and print what went wrong. Without a TPU's device
    file it is only a compiler here, so jax is told to use the other platforms. A `JAX_PLATFORMS` of the user's stays.
    """
    if importlib.util.find_spec("libtpu") is None or any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists():
        return
    cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if cuda and Path("/dev/nvidia0").exists() else "cpu")
    # Importing libtpu as a compiler asks the same questions; these answer them.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def keep_memory() -> None:
    """Let glibc keep the buffers it has: XLA's on CPU are large, and mapping them anew took a quarter of a step."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)


choose_platform()
keep_memory()
