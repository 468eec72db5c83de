"""Compiled programs are read as they run: loops as often as they turn, one exchange once, kernels by their shapes."""

import pytest

from tests.small import small
from vishwamai_eqx import aot, program

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%condition (p: (s32[], bf16[64,32])) -> pred[] {
  %limit = s32[]{:T(256)} constant(24)
  %p = (s32[]{:T(256)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(256)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(1024)} compare(%i, %limit), direction=LT
}

%piece.1 (x: bf16[8,32]) -> bf16[64,32] {
  %x = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=4, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
}

%piece.2 (x: bf16[8,32]) -> bf16[64,32] {
  %x = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=4, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
}

%products (l: bf16[4,16,32], r: bf16[32,64]) -> f32[4,16,64] {
  %l = bf16[4,16,32]{2,1,0} parameter(0)
  %r = bf16[32,64]{1,0} parameter(1)
  %convolution = f32[4,16,64]{2,1,0} convolution(%l, %r), window={size=1}, dim_labels=0bf_io0->0bf
  %g = f32[4,16,64]{2,1,0} copy(%convolution)
  ROOT %again = f32[32,64,1]{1,0,2} convolution(%l, %g), window={size=4}, dim_labels=0fb_0io->bf0, \
metadata={op_name="jit(step)/checkpoint/rematted_computation/dot_general"}
}

%body (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %p = (s32[]{:T(256)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %l = bf16[4,16,32]{2,1,0} parameter(2)
  %r = bf16[32,64]{1,0} parameter(3)
  %one = bf16[64,32]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  %two = bf16[64,32]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
  %f = f32[4,16,64]{2,1,0} fusion(%l, %r), kind=kOutput, calls=%products
  %g.1 = bf16[64,32]{1,0} all-to-all(%one), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %g.2 = (bf16[64]{0}, f32[32]{0}) all-reduce(%v, %w), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %v = bf16[64]{0} copy(%p)
  %w = f32[32]{0} copy(%p)
  %k = bf16[600,64]{1,0} custom-call(%s, %rows, %r), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/experts/grouped_matmul_fwd/pallas_call"}
  %s = s32[8]{0} copy(%p)
  %rows = bf16[600,32]{1,0} copy(%p)
  ROOT %t = (s32[]{:T(256)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%p, %one)
}

ENTRY %main (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %in = bf16[8,32]{1,0} copy(%p)
  %start = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%in), channel_id=9, dimensions={0}
  %done = bf16[64,32]{1,0} all-gather-done(%start)
  %t = (s32[]{:T(256)}, /*index=1*/bf16[64,32]{1,0}) tuple(%p, %done)
  %w = (s32[]{:T(256)}, /*index=1*/bf16[64,32]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%w), index=1
}
"""


def kernel(name, operands, results):
    assert name == "grouped_matmul_fwd"
    assert [it.sizes for it in operands] == [(8,), (600, 32), (32, 64)]
    assert [it.sizes for it in results] == [(600, 64)]
    return 1000.0, 100.0


def test_loops_count_as_often_as_they_turn():
    found = program.read(TEXT, 8, kernel)
    product = 2 * 4 * 16 * 32 * 64
    assert found.flops == 24 * (2 * product + 1000)
    assert found.flops_again == 24 * (product + 100)


def test_an_exchange_in_pieces_counts_once_and_others_by_their_whole_array():
    found = program.read(TEXT, 8, kernel)
    whole = 64 * 32 * 2
    assert found.bytes_by_kind == {"all-gather": 25 * whole, "all-to-all": 24 * whole, "all-reduce": 24 * 256}
    by_kind = {(it.kind, it.times): it for it in found.collectives}
    assert by_kind["all-reduce", 24].group == 2
    assert by_kind["all-to-all", 24].group == 8
    # On a ring: of two devices each sends half, twice.
    assert by_kind["all-reduce", 24].wire_bytes == 256
    assert by_kind["all-to-all", 24].wire_bytes == whole * 7 / 8


def test_gathered_arrays_of_a_turn_and_those_around_it_are_there_at_once():
    whole = 64 * 32 * 2
    # One before the loop, one in each turn, and one that the turn before hands on.
    assert program.read(TEXT, 8, kernel).gathered == 3 * whole
    alone = TEXT.replace("(s32[]{:T(256)}, /*index=1*/bf16[64,32]{1,0}) while", "(s32[]{:T(256)}) while")
    assert program.read(alone, 8, kernel).gathered == 2 * whole


def test_the_scaled_product_counts_by_its_shapes():
    text = """
ENTRY %main (x: f8e4m3fn[64,256], w: f8e4m3fn[128,256]) -> bf16[64,128] {
  %x = f8e4m3fn[64,256]{1,0} parameter(0)
  %w = f8e4m3fn[128,256]{1,0} parameter(1)
  %s = f32[1,2,128]{2,1,0} copy(%w)
  ROOT %y = bf16[64,128]{1,0} custom-call(%x, %w, %s), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/fp8_gemm/scaled_matmul/gemm_scaled/pallas_call"}
}
"""
    assert program.read(text, 1, aot.counter(small(), 64)).flops == 2 * 64 * 256 * 128


def test_a_loop_that_does_not_say_how_often_is_refused():
    with pytest.raises(ValueError, match="does not say how often"):
        program.read(TEXT.replace("direction=LT", "direction=NE"), 8, kernel)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "window", "labels", "multiplied"),
    [
        # Two rows as a window's places: of its four meetings two are with padding.
        ("32,16,1", "2,64,32", "2,64,16", "size=2 pad=1_1 rhs_reversal=1", "fb0_0oi->0fb", 2 * 64 * 16 * 32),
        (
            "2,16,32,1",
            "4,8,32,1",
            "2,4,16,8",
            "size=1x4 pad=0_0x3_3 rhs_reversal=0x1",
            "0bf1_1oi0->01bf",
            2 * 4 * 16 * 8 * 32,
        ),
        ("4,16,32", "4,16,64", "32,64,1", "size=4", "0fb_0io->bf0", 4 * 16 * 32 * 64),
        ("8,7", "3,7", "8,3", "", "bf_oi->bf", 8 * 3 * 7),
        # A step of two over five places, with a hole between two taps.
        ("1,5,1", "2,1,1", "1,2,1", "size=2 stride=2 rhs_dilate=2", "b0f_0io->b0f", 4),
    ],
)
def test_a_window_on_padding_multiplies_nothing(lhs, rhs, out, window, labels, multiplied):
    text = f"""
ENTRY %main (l: f32[{lhs}], r: f32[{rhs}]) -> f32[{out}] {{
  %l = f32[{lhs}]{{0}} parameter(0)
  %r = f32[{rhs}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%l, %r), {f"window={{{window}}}, " if window else ""}dim_labels={labels}
}}
"""
    assert program.read(text, 1, kernel).flops == 2 * multiplied
