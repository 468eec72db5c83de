"""What a run would be: parameters, memory, FLOPs, exchanges and the time they bound, for TPUs that are not there.

Everything is estimated by hand first; then the real training step is compiled and the compiler's word stands beside it.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from kernels import topology
from vishwamai_eqx import aot, flops, memory, optim, parameters, plan, roofline, state
from vishwamai_eqx.config import Config, parse_mesh
from vishwamai_eqx.mesh import make_mesh
from vishwamai_eqx.precision import compute_dtype

StepOf = Callable[[Config, Mesh, str], tuple[jax.stages.Wrapped, tuple[Any, ...]]]
"""From configuration, mesh and compute type to the jitted step and its abstract arguments."""

FITS, TOO_BIG = 0, 3


def devices(config: Config) -> int:
    """Devices that the run is for: those of the topology, else those that are here.

    **Raises** ValueError for a topology that there is not.
    """
    return topology.count(config.topology) if config.dry_run and config.topology else jax.device_count()


def run(config: Config, step_of: StepOf) -> int:
    """Print what the run would be; the exit code: 0, or 3 for a step that does not fit.

    **Raises** ValueError for a topology that there is not, or where the compiler is not installed.
    """
    if config.topology is None:
        _print_totals(config)
        return FITS
    topology.devices(config.topology)  # refused here, before anything is worked out
    found = plan.search(config) if config.plan else None
    config = found.config if found else plan.settled(config, devices(config), topology.parse(config.topology)[0].hbm)
    report = examine(config, parse_mesh(config.mesh, devices(config)), step_of)
    if found is not None:
        report["plan"] = {"searched": found.searched, "settings": plan.settings(config)}
    print(json.dumps(report) if config.json else text(report))
    return FITS if report["fits"] else TOO_BIG


def examine(config: Config, sizes: dict[str, int], step_of: StepOf) -> dict[str, Any]:
    """The report of one configuration on its topology, as it is printed with `--json`."""
    assert config.topology is not None
    generation, shape = topology.parse(config.topology)
    on = make_mesh(sizes, topology.devices(config.topology))
    dtype = compute_dtype("bf16" if config.precision == "auto" else config.precision)
    by_hand, held = memory.estimate(config, sizes), memory.shards(config, sizes)
    compiled = aot.compile_step(*step_of(config, on, dtype), on, config)

    tokens = config.optim.batch_size * config.model.max_seq_len
    total, active = flops.parameters(config)
    of_model = flops.per_token(config) + flops.of_teacher(config)
    here = tokens / on.size
    program = compiled.program
    if program is None:
        counted, again, multiplied, wire = None, None, roofline.executed(config) * here, 0.0
    else:
        counted = (program.flops - program.flops_again) / here
        again, multiplied = program.flops_again / here, program.flops
        wire = roofline.wire_bytes(program, shape)
    state_bytes = by_hand.parameters + by_hand.optimizer
    moved = roofline.hbm_bytes(config, state_bytes, held.gathered * (4 if dtype == "float32" else 2))
    bound = roofline.roofline(generation, multiplied, of_model * here, moved, wire)
    scale = (compiled.peak - state_bytes) / (by_hand.peak - state_bytes)
    known = by_hand.parameters + by_hand.optimizer + by_hand.gradients + by_hand.teacher
    return {
        "topology": config.topology,
        "device": generation.device_kind,
        "devices": on.size,
        "mesh": sizes,
        "precision": dtype,
        "remat": config.model.remat,
        "batch": {
            "rows": config.optim.batch_size,
            "microbatches": config.optim.microbatches,
            "rows_per_device": memory.rows(config, sizes),
            "tokens": tokens,
        },
        "parameters": {"total": total, "active": active},
        "fits": compiled.fits,
        "hbm": {
            "capacity": generation.hbm,
            "peak": compiled.peak,
            "parameters": by_hand.parameters,
            "optimizer": by_hand.optimizer,
            "gradients": by_hand.gradients,
            **({"teacher": by_hand.teacher} if config.teacher is not None else {}),
            # All the rest of the compiler's, which does not say what of it is activations.
            "temporaries": compiled.peak - known,
        },
        "hbm_by_hand": {**dataclasses.asdict(by_hand), "peak": by_hand.peak},
        "flops_per_token": {"hand": of_model, "compiler": counted, "again": again},
        "collective_bytes": {} if program is None else program.bytes_by_kind,
        "gathered_at_once": None if program is None else program.gathered,
        "roofline": {
            "seconds": bound.seconds,
            "mfu": bound.mfu,
            "bound": bound.bound,
            "compute_seconds": bound.compute,
            "hbm_seconds": bound.hbm,
            "ici_seconds": bound.ici,
            "flops": multiplied,
            "hbm_bytes": moved,
            "wire_bytes": wire,
            "peak_flops": generation.peak_flops,
            "hbm_bandwidth": generation.hbm_bandwidth,
            "ici_bandwidth": generation.ici_bandwidth,
        },
        "compile_seconds": compiled.seconds,
        "nearest": [] if compiled.fits else plan.nearest(config, scale),
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    batch, hbm, hand, per_token = (report[name] for name in ("batch", "hbm", "hbm_by_hand", "flops_per_token"))
    line, counts = report["roofline"], report["parameters"]
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}: {report['devices']} devices ({report['device']}), mesh {mesh}, {report['precision']}, "
        f"remat {report['remat']}",
        f"a step: {batch['rows']} rows, {batch['tokens']:,} tokens, in {batch['microbatches']} microbatches of "
        f"{batch['rows_per_device']} rows a device",
        f"parameters: {counts['total']:,}, {counts['active']:,} of them active for a token",
        "",
        f"{'HBM a device, GiB':24}{'by hand':>10}{'compiler':>10}",
        *(
            _sizes(name, hand[name], hbm[name])
            for name in ("parameters", "optimizer", "gradients", "teacher")
            if name in hbm
        ),
        _sizes("activations", hand["activations"], None),
        _sizes("temporaries", hand["temporaries"], None),
        _sizes("  both together", hand["activations"] + hand["temporaries"], hbm["temporaries"]),
        _sizes("peak", hand["peak"], hbm["peak"]),
        _sizes("capacity", hbm["capacity"], hbm["capacity"]),
        "",
        f"FLOPs a token: {per_token['hand']:.4g} by hand"
        + (
            ""
            if per_token["compiler"] is None
            else f", {per_token['compiler']:.4g} in the compiled program, and {per_token['again']:.4g} done again"
        ),
    ]
    lines += [f"{kind} a step: {size / 1e9:.4g} GB" for kind, size in sorted(report["collective_bytes"].items())]
    if report["gathered_at_once"] is not None:
        lines.append(f"gathered arrays at once: {report['gathered_at_once'] / 1e9:.4g} GB at most")
    terms = (
        ("compute", "FLOPs", line["flops"], line["peak_flops"], "FLOP/s"),
        ("hbm", "HBM bytes", line["hbm_bytes"], line["hbm_bandwidth"], "B/s"),
        ("ici", "wire bytes", line["wire_bytes"], line["ici_bandwidth"], "B/s"),
    )
    lines += [
        "",
        "roofline: seconds = max of",
        *(
            f"  {amount:10.4g} {what:10} / {rate:10.4g} {unit:7} = {line[f'{name}_seconds']:.4g} s"
            for name, what, amount, rate, unit in terms
        ),
        f"a step takes at least {line['seconds']:.4g} s ({line['bound']}), which bounds MFU = model FLOPs / "
        f"(seconds * peak) at {line['mfu']:.1%}",
        f"compiled in {report['compile_seconds']:.0f} s",
        "",
        "it fits"
        if report["fits"]
        else f"it does not fit: {hbm['peak'] / 2**30:.2f} of {hbm['capacity'] / 2**30:.2f} GiB",
        *(f"nearest that does, by the estimate: {_flags(it)}" for it in report["nearest"]),
    ]
    if "plan" in report:
        lines.insert(0, f"best of {report['plan']['searched']}: {_flags(report['plan']['settings'])}")
    return "\n".join(lines)


def _sizes(name: str, hand: int, compiler: int | None) -> str:
    word = "" if compiler is None else f"{compiler / 2**30:.3f}"
    return f"{name:24}{hand / 2**30:>10.3f}{word:>10}"


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _print_totals(config: Config) -> None:
    abstract = state.abstract_state(config, compute_dtype(config.precision), optim.optimizer(config.optim))
    total, (_, active) = parameters.count(abstract.model), flops.parameters(config)
    per_token = flops.per_token(config) + flops.of_teacher(config)
    if config.json:
        print(json.dumps({"parameters": {"total": total, "active": active}, "flops_per_token": {"hand": per_token}}))
    else:
        print(f"preset {config.preset}: {total:,} parameters, {active:,} of them active for a token")
        print(f"a token takes {per_token:,.0f} FLOPs of training")
