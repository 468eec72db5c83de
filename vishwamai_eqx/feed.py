"""Batches on the devices before they are needed."""

import functools
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int32

from vishwamai_eqx.data import Batch, Dataset, DrawnBatch, PairedBatch
from vishwamai_eqx.pairs import Pairs
from vishwamai_eqx.targets import Targets


class Feed:
    """The batches of the given steps, in order, each made and sent while earlier ones are computed on.

    `sharding` places `[microbatches, rows, seq]`. After each batch `waited` is how long it was waited for, in seconds.
    """

    def __init__(
        self,
        dataset: Dataset | Pairs | Targets,
        steps: range,
        sharding: jax.sharding.Sharding,
        *,
        microbatches: int = 1,
        workers: int = 2,
        ahead: int = 2,
    ):
        self.waited = 0.0
        self._batches = (
            grain.MapDataset.range(steps.start, steps.stop, steps.step)
            .map(lambda n: place(dataset, int(n), sharding, microbatches))
            .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead))
        )

    def __iter__(self) -> Iterator[Batch | PairedBatch | DrawnBatch]:
        batches = iter(self._batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited = time.perf_counter() - before
            yield batch


def place(
    dataset: Dataset | Pairs | Targets, n: int, sharding: jax.sharding.Sharding, microbatches: int = 1
) -> Batch | PairedBatch | DrawnBatch:
    """Batch n as global arrays `[microbatches, rows, seq]`; only the rows of this process's devices are read."""
    rows = dataset.batch_size // microbatches
    # Pages that the device can fetch from by itself, where there are such.
    staging = sharding
    if all(_has_pinned_host(device) for device in sharding.addressable_devices):
        staging = sharding.with_memory_kind("pinned_host")
    parts: dict[str, list[Int32[np.ndarray, "microbatches rows seq"]]] = {}

    def part(index: Any, field: int) -> Int32[np.ndarray, "microbatches rows seq"]:
        micro, row, column = index
        key = str(index)  # slices have no hash before Python 3.12
        if key not in parts:
            chosen = range(rows)[row]
            read = [
                dataset.batch(n, slice(number * rows + chosen.start, number * rows + chosen.stop))
                for number in range(microbatches)[micro]
            ]
            parts[key] = [np.stack(fields) for fields in zip(*read, strict=True)]
        return parts[key][field][:, :, column]

    arrays = [
        jax.make_array_from_callback((microbatches, rows, width), staging, functools.partial(part, field=field))
        for field, width in enumerate(dataset.widths)
    ]
    return dataset.kind(*(arrays if staging is sharding else jax.device_put(arrays, sharding)))


def _has_pinned_host(device: jax.Device) -> bool:
    return device.platform != "cpu" and "pinned_host" in {memory.kind for memory in device.addressable_memories()}
