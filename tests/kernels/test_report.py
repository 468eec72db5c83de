"""The report of static schedules: what is read of a schedule, which row is printed, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kernels import report, schedule
from kernels.tpu import GENERATIONS

# Four delay cycles follow a branch on v5e. Bundles 2 to 31 are the loop; of two branches that multiply as much the
# shorter one counts; what is skipped and multiplies nothing does not.
MATMUL = "%1 = vmatmul.bf16.gmra.mxu0 %v2_v2"
SPILL = "vst [vmem:[#allocation9_spill] sm:$0xff] %v1_v1"


def written(folder, bundles):
    lines = [f"  {hex(index)}   : > {{ {body} }}" for index, body in enumerate(bundles)]
    path = folder / "17-some_kernel.1-64-packed-bundles-post-ra.txt"
    path.write_text("// a comment\n" + "\n".join(lines) + "\n")
    (folder / "17-schedule-analysis_some_kernel.1-65-packed-bundles-post-ra.txt").write_text("")
    return path


def branch(target):
    return f"%4 = sbr.rel (!%p1_p1) target bundleno = {target} ({hex(target)}), region = 3"


def program():
    bundles = [""] * 40
    bundles[2] = branch(9)  # skips 7 and 8, which multiply nothing
    bundles[9] = branch(18)  # skips 14 to 17: two products and a spill
    bundles[14] = bundles[15] = f"{MATMUL} ;; {SPILL}"
    bundles[18] = branch(26)  # skips 23 to 25: the same two products
    bundles[23] = bundles[24] = MATMUL
    bundles[27] = branch(2)
    return bundles


def test_a_schedule_counts_a_step(tmp_path):
    path = written(tmp_path, program())
    assert schedule.kernels_in(tmp_path)["some_kernel.1"] == path
    it = schedule.read(path, GENERATIONS["v5e"])
    assert (it.kernel_cycles, it.loop_cycles) == (40, 30)
    assert it.cycles == 30 - 2 - 4
    # Two instructions of 16 rows, a row a cycle, on one of four units of 128 x 128.
    assert (it.matmul_cycles, it.macs, it.spills) == (8, 2 * 16 * 128**2, 0)
    assert it.occupancy == 8 / 24
    straight = schedule.read(written(tmp_path, [MATMUL, "", MATMUL]), GENERATIONS["v6e"])
    assert (straight.cycles, straight.matmul_cycles) == (3, 8), "two units, two rows a cycle"


def test_f32_and_eight_bits_feed_other_numbers_of_rows(tmp_path):
    for suffix, rows, cycles in (("f32.gmra", 8, 8), ("s8.s32.gmra", 32, 16), ("f8e4m3fn.gmra", 32, 32)):
        bundles = [body.replace("bf16.gmra", suffix) for body in program()]
        it = schedule.read(written(tmp_path, bundles), GENERATIONS["v5e"])
        assert (it.macs, it.matmul_cycles) == (2 * rows * 128**2, 2 * cycles / 4), suffix


def test_a_file_that_is_no_schedule_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="has no line of a schedule"):
        schedule.read(path, GENERATIONS["v3"])


def test_the_best_blocks_are_printed_and_refusals_kept():
    head = {"operation": "grouped_matmul forward", "implementation": "megablox"}
    rows = [
        {**head, "blocks": "a", "compiled": False, "error": "no"},
        {**head, "blocks": "b", "compiled": True, "useful_share": 0.5},
        {**head, "blocks": "c", "compiled": True, "useful_share": 0.4},
        {**head, "implementation": "other", "blocks": "", "compiled": False, "error": "Mosaic failed"},
    ]
    best = list(report._best(iter(rows)))
    assert [row["blocks"] for row in best] == ["b", ""]
    assert "refused: Mosaic failed" in report._line(best[1])


def test_products_in_8_bits_are_held_beside_16():
    def row(name, cycles, moved, operation="gemm"):
        return {"operation": operation, "implementation": name, "kernel_cycles": cycles, "bytes": moved}

    rows = [row("bfloat16", 100, 40), row("e4m3", 101, 20), row("int8", 50, 20), row("e4m3 by 128", 120, 22)]
    rows += [{"operation": "gemm", "implementation": "x", "compiled": False, "error": "no"}, row("other", 1, 1, "moe")]
    assert list(report._savings(rows, "bfloat16")) == [
        "gemm e4m3: 1.01 of the cycles and 0.50 of the bytes of bfloat16: saves bytes only",
        "gemm int8: 0.50 of the cycles and 0.50 of the bytes of bfloat16: saves cycles and bytes",
        "gemm e4m3 by 128: 1.20 of the cycles and 0.55 of the bytes of bfloat16: saves bytes only and costs cycles",
    ]
    assert not list(report._savings(rows[1:], "bfloat16"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--generations", "v3,v9"], "--generations v9: not one of v2, v3"),
        (["--shape", "rows=0,depth=3"], "--shape rows=0,depth=3: expected positive numbers"),
    ],
)
def test_what_cannot_be_reported_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu here: pip install 'jax[tpu]'")
def test_a_report_of_one_generation(tmp_path):
    command = [sys.executable, "-m", "kernels.report", "--generations", "v3", "--operations", "grouped_matmul forward"]
    command += ["--shape", "rows=512,k=256,n=256,groups=2", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["pallas_tpu"]["schedule"]["cycles"] > 0 and 0 < rows["pallas_tpu"]["useful_share"] <= 1
    assert "megablox" not in rows, "v3 has no bf16 product, which megablox asks for: it is given f32"
    assert any(name.startswith("megablox") for name in rows)
    assert "what they leave out" in done.stdout.lower()
