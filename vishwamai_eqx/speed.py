"""How fast a run goes."""

import time
from typing import Any

from vishwamai_eqx import data, flops, scaling, teaching
from vishwamai_eqx.config import Config


class Speed:
    """A step's row for the logbook, with tokens per second and, where the chip's peak is known, FLOPs utilisation."""

    def __init__(self, config: Config, kind: str, devices: int):
        self.flops = flops.per_token(config) + flops.of_teacher(config)
        self.peak = flops.PEAK_FLOPS.get(kind, 0.0) * devices
        self.previous: Any = None
        self.time, self.note = time.perf_counter(), ""

    def __call__(self, metrics: Any) -> dict[str, Any]:
        # Waits for the step before this one, so that the device always has one to go on with.
        awaited = self.previous or metrics
        loss, tokens, self.previous = float(awaited.loss), float(awaited.tokens), metrics
        now = time.perf_counter()
        rate, self.time = tokens / (now - self.time), now
        row: dict[str, Any] = {
            name: getattr(metrics, name) for name in ("loss", "grad_norm", "learning_rate", "tokens")
        }
        row |= {"tokens_per_second": rate, "balance": metrics.balance, "router_z": metrics.router_z}
        row |= {"batch_hash": data.BatchHash(metrics.batch), "skipped": metrics.watch.skipped}
        row |= teaching.row(metrics.told) | scaling.row(metrics.scaled)
        self.note = f"loss {loss:.3f} · {rate:,.0f} tokens/s"
        if self.peak:
            row["mfu"] = rate * self.flops / self.peak
            self.note += f" · MFU {row['mfu']:.1%}"
        return row
