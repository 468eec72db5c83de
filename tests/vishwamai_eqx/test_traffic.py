"""What a program moves, by hand and as its text is read."""

from vishwamai_eqx import traffic

# A loop of eight trips over layers of 1 MiB: each is sliced in a fusion, one more on its way to vector memory; of a
# cache of 2 MiB, 1 KiB is written where it is.
TEXT = """
HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: bf16[8,512,1024], param_1.1: s32[]) -> bf16[512,1024] {
  %param_0.1 = bf16[8,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero), dynamic_slice_sizes={1,512,1024}
  ROOT %bitcast = bf16[512,1024]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%fused_product (param_0.2: bf16[8,512,1024], param_1.2: s32[], param_2.2: bf16[4,512]) -> bf16[4,1024] {
  %param_0.2 = bf16[8,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = s32[]{:T(128)S(6)} parameter(1)
  %param_2.2 = bf16[4,512]{1,0:T(4,128)(2,1)S(1)} parameter(2)
  %layer = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%param_0.2, %param_1.2), kind=kLoop, calls=%fused_slice
  ROOT %product = bf16[4,1024]{1,0:T(4,128)(2,1)S(1)} convolution(%param_2.2, %layer), dim_labels=bf_io->bf
}

%fused_update (param_0.3: bf16[1024,1024], param_1.3: bf16[1,512]) -> bf16[1024,1024] {
  %param_0.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.3 = bf16[1,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %at = s32[]{:T(128)} constant(3)
  ROOT %update = bf16[1024,1024]{1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0.3, %param_1.3, %at, %at)
}

%condition (arg.1: (s32[], bf16[8,512,1024], bf16[1024,1024])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,512,1024]{2,1,0}, bf16[1024,1024]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %trips = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %trips), direction=LT
}

%body (arg.2: (s32[], bf16[8,512,1024], bf16[1024,1024])) -> (s32[], bf16[8,512,1024], bf16[1024,1024]) {
  %arg.2 = (s32[]{:T(128)}, bf16[8,512,1024]{2,1,0}, bf16[1024,1024]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%arg.2), index=0
  %weights = bf16[8,512,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.2), index=1
  %cache = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.2), index=2
  %x = bf16[4,512]{1,0:T(4,128)(2,1)S(1)} constant({...})
  %started = ((bf16[8,512,1024]{2,1,0:T(8,128)(2,1)}), bf16[1,512,1024]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%weights), slice={[0:1], [0:512], [0:1024]}
  %done = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%started)
  %y = bf16[4,1024]{1,0:T(4,128)(2,1)S(1)} fusion(%weights, %i.2, %x), kind=kOutput, calls=%fused_product
  %row = bf16[1,512]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %written = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%cache, %row), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[]{:T(128)}, bf16[8,512,1024]{2,1,0}, bf16[1024,1024]{1,0}) tuple(%i.2, %weights, %written)
}

ENTRY %main (p0: bf16[8,512,1024], p1: bf16[1024,1024]) -> bf16[1024,1024] {
  %p0 = bf16[8,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %copied = bf16[1024,1024]{1,0:T(8,128)(2,1)} copy(%p1)
  %start = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[8,512,1024]{2,1,0}, bf16[1024,1024]{1,0}) tuple(%start, %p0, %copied)
  %loop = (s32[]{:T(128)}, bf16[8,512,1024]{2,1,0}, bf16[1024,1024]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %out = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_slices_and_updates_count_as_often_as_the_loop_runs():
    layer, update, cache = 512 * 1024 * 2, 512 * 2, 1024 * 1024 * 2
    # The copy before the loop is read and written whole; of the update as much is read and written as is new.
    assert traffic.moved(TEXT) == 8 * (layer + layer + 2 * update) + 2 * cache
