"""Hand estimates of memory and time, and what is chosen by them; nothing here is compiled."""

import dataclasses
import json
from pathlib import Path

import pytest

import train
from kernels import topology
from vishwamai_eqx import aot, command_line, memory, plan, roofline
from vishwamai_eqx.config import PRESETS, Config, parse_mesh
from vishwamai_eqx.program import Program


def base(name: str = "v3:2x2", rows: int = 4, **model: object) -> Config:
    return dataclasses.replace(
        PRESETS["base"],
        topology=name,
        dry_run=True,
        model=dataclasses.replace(PRESETS["base"].model, **model),
        optim=dataclasses.replace(PRESETS["base"].optim, batch_size=rows * topology.count(name)),
    )


def peak(config: Config) -> int:
    assert config.topology is not None
    return memory.estimate(config, {"data": topology.count(config.topology)}).peak


def test_more_rows_layers_and_less_remat_need_more():
    assert peak(base(rows=1)) < peak(base()) < peak(base(rows=8))
    assert peak(base(num_layers=12)) < peak(base())
    assert peak(base()) < peak(base(remat="dots")) < peak(base(remat="none"))
    assert peak(base("v3:4x4")) < peak(base())


def test_state_is_counted_to_the_byte():
    """Parameters and two moments in f32, an eighth of each, but for the norms and the counts."""
    found = memory.shards(base(), {"data": 8})
    total = 1_497_589_248
    norms = (24 * 4 + 2) * 768
    assert found.parameters == (total - norms) // 8 + norms
    assert 0 < found.optimizer - 2 * found.parameters < 10
    assert found.gathered == total - 2 * 768


def test_auto_takes_the_expert_axis_and_then_the_model_axis_where_data_is_not_enough():
    config = base()
    assert plan.settled(config, 8, None) == config  # nothing is known of the devices
    assert plan.settled(config, 8, 16 * 2**30).mesh == "auto"
    # Gathered weights are most of the memory here; with many tokens room for the worst load would be.
    wide = base(rows=1, hidden_size=3072, ffn_dim=24_576, num_layers=2, max_seq_len=256)
    assert [*plan.meshes(wide, 8)][:5] == ["auto", "data=4,expert=2", "data=2,expert=4", "expert=8", "data=4,model=2"]
    peaks = {
        spec: memory.estimate(wide, parse_mesh(spec, 8)).peak
        for spec in ("auto", "data=4,expert=2", "expert=2,model=4")
    }
    assert peaks["auto"] > peaks["data=4,expert=2"] > peaks["expert=2,model=4"]
    for spec, needed in peaks.items():
        assert plan.settled(wide, 8, int(needed / plan.MARGIN) + 1).mesh == spec
    assert plan.settled(wide, 8, 1).mesh == "auto"  # nothing fits
    asked = dataclasses.replace(wide, mesh="data=8")
    assert plan.settled(asked, 8, 1) == asked


COMPILED = json.loads((Path(__file__).parents[1] / "studies" / "topologies.json").read_text())


@pytest.mark.parametrize("case", COMPILED)
def test_the_estimate_is_within_15_percent_of_what_the_compiler_said(case):
    """Unlike configurations, meshes and generations, as the study compiled them."""
    found = COMPILED[case]
    config = command_line.parse(found["command"].replace("--json", "").split()[2:])
    by_hand = memory.estimate(config, found["mesh"])
    assert by_hand.peak == pytest.approx(found["hbm"]["peak"], rel=0.15)


def test_the_search_keeps_the_batch_and_fits():
    config = base(rows=64)
    found = plan.search(config)
    assert found.searched > 10
    assert found.config.optim.batch_size == config.optim.batch_size
    assert peak(config) > topology.parse("v3:2x2")[0].hbm >= peak(found.config)


def test_the_nearest_changes_one_setting_where_that_is_enough():
    config = base(rows=64)
    found = plan.nearest(config, 1.0)
    assert found[0] == {"optim.microbatches": found[0]["optim.microbatches"], "model.remat": "full", "mesh": "auto"}
    parts = found[0]["optim.microbatches"]
    assert parts > 1
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, microbatches=parts))
    assert peak(changed) <= topology.parse("v3:2x2")[0].hbm
    # If the compiler needs twice what the estimate says, the answer is a smaller microbatch.
    assert plan.nearest(config, 2.0)[0]["optim.microbatches"] > parts


def test_executed_flops_are_the_models_and_what_remat_does_again():
    full, dots, none = (roofline.executed(base(remat=remat)) for remat in ("full", "dots", "none"))
    of_model = 3_096_732_672
    assert of_model < none < dots < full < of_model * 4 / 3


def test_mean_distances_on_a_torus():
    assert roofline.hops((2, 2)) == 1.0
    assert roofline.hops((4, 4)) == 2.0
    assert roofline.hops((32, 32)) == 16.0
    assert roofline.hops((1, 1, 1)) == 1.0


def test_a_step_that_does_not_fit_is_exit_code_3_with_what_does(monkeypatch, capsys):
    def too_big(step, arguments, on, config):
        return aot.Compiled(40 * 2**30, None, 1.0)

    monkeypatch.setattr(aot, "compile_step", too_big)
    monkeypatch.setattr(train, "abstract_step", lambda *_: (None, None))
    arguments = ["--preset", "base", "--dry-run", "--topology", "v3:2x2"]
    assert train.main(arguments) == 3
    assert "it does not fit: 40.00 of 15.48 GiB\nnearest that does, by the estimate: --optim.microbatches" in (
        capsys.readouterr().out
    )
    assert train.main([*arguments, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"]
    assert report["nearest"][0]["optim.microbatches"] > 1


def test_a_step_that_fits_is_exit_code_0(monkeypatch, capsys):
    monkeypatch.setattr(aot, "compile_step", lambda *_: aot.Compiled(5 * 2**30, Program((), (), 0), 1.0))
    monkeypatch.setattr(train, "abstract_step", lambda *_: (None, None))
    assert train.main(["--preset", "base", "--dry-run", "--topology", "v3:2x2", "--json", "--plan"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    assert report["plan"]["searched"] > 10
    assert report["hbm"].keys() == {"capacity", "peak", "parameters", "optimizer", "gradients", "temporaries"}
    parts = ("parameters", "optimizer", "gradients", "temporaries")
    assert sum(report["hbm"][part] for part in parts) == report["hbm"]["peak"] == 5 * 2**30


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--dry-run --topology v9:2x2", "topology='v9:2x2' must be NAME:SHAPE"),
        ("--dry-run --topology v3:3x3", "topology='v3:3x3' must have AxB chips"),
        ("--topology v3:2x2", "topology='v3:2x2' must be with --dry-run"),
        ("--dry-run --plan", "plan=True must be with --topology"),
        ("--preset base --dry-run --topology v3:32x32", "= 2048; take 2048."),
        ("--dry-run --topology v3:2x2 --mesh data=9", "at most the 8 devices"),
    ],
)
def test_refusals_come_before_anything_is_compiled(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(aot, "compile_step", None)
    assert train.main(arguments.split()) == 2
    assert sentence in capsys.readouterr().err


def test_what_the_compiler_says_it_needs_is_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (600.00G) exc"
    assert aot.exhausted(said) == 600 * 2**30
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.71G of 1"
    )
    assert aot.exhausted(said) == round(20.71 * 2**30)
    assert aot.exhausted("INVALID_ARGUMENT: no such thing") is None
    assert (
        aot.exhausted("RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 49.1K of 16.0K smem.") is None
    )
