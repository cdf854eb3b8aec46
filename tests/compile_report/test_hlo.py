"""HBM and ICI bytes against counts by hand, on small pieces of compiled text."""

from __future__ import annotations

import pytest

from omni_jax.compile_report import hlo

HEADER = "HloModule test, is_scheduled=true\n\n"


def cost(text: str, **options: int) -> hlo.Cost:
    return hlo.parse(HEADER + text, **options).cost


def trip_count(text: str) -> int | None:
    """Of the only loop."""
    module = hlo.parse(HEADER + text)
    (loop,) = (line for lines in module.computations.values() for line in lines if line.opcode == "while")
    return module.trip_count(loop)


@pytest.mark.parametrize(
    ("text", "bytes", "hbm"),
    [
        ("f32[3,5]{1,0}", 60, True),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, True),
        ("bf16[3,5]{0,1:T(8,128)(2,1)}", 8 * 128 * 2, True),
        ("f32[130]{0:T(128)}", 256 * 4, True),
        ("f32[2,130,8]{1,2,0:T(8,128)}", 2 * 256 * 8 * 4, True),
        ("s8[16]{0:T(1024)S(1)}", 1024, False),
        ("pred[]{:T(512)}", 1, True),
        ("s4[10]{0}", 5, True),
    ],
)
def test_parse_shapes(text: str, bytes: int, hbm: bool) -> None:
    assert hlo.parse_shapes(text) == (hlo.Shape(bytes, hbm),)


def test_parse_shapes_of_tuples() -> None:
    assert [shape.bytes for shape in hlo.parse_shapes("(s32[]{:T(128)}, bf16[8,4]{1,0}, /*index=2*/token[])")] == [
        4,
        64,
    ]


def test_instruction_reads_operands_and_writes_result() -> None:
    text = """
ENTRY %main (a: f32[10], b: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = f32[10]{0:S(1)} parameter(1)
  %sum = f32[10]{0} add(%a, %b)
  ROOT %copy = f32[10]{0:S(1)} copy(%sum)
}
"""
    # Read a, write sum, read sum; b and the copy are on the chip.
    assert cost(text).hbm == 40 + 40 + 40


def test_loop_counts_by_its_trip_count() -> None:
    text = """
%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[100]{0} get-tuple-element(%p), index=1
  %y = f32[100]{0} negate(%x)
  ROOT %t = (s32[], f32[100]{0}) tuple(%i, %y)
}

%condition (q: (s32[], f32[100])) -> pred[] {
  %q = (s32[], f32[100]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(24)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[100])) -> (s32[], f32[100]) {
  %a = (s32[], f32[100]{0}) parameter(0)
  ROOT %w = (s32[], f32[100]{0}) while(%a), condition=%condition, body=%body
}
"""
    # Each iteration reads and writes x, and compares two numbers of 4 bytes into one of 1 byte.
    assert cost(text).hbm == 24 * (800 + 9)
    assert trip_count(text) == 24
    annotated = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert cost(annotated).hbm == 3 * (800 + 9)
    unknown = text.replace("%n = s32[] constant(24)", "%n = s32[] get-tuple-element(%q), index=0")
    assert trip_count(unknown) is None
    assert cost(unknown, unknown_trips=5).hbm == 5 * (800 + 9)


def test_slice_and_update_in_place_count_bytes_moved() -> None:
    text = """
%inner (r: f32[24,100], k: s32[]) -> f32[1,100] {
  %r = f32[24,100]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%r, %k, %k), dynamic_slice_sizes={1,100}
}

%outer (p: f32[24,100], n: s32[], c: f32[24,100]) -> f32[24,100] {
  %p = f32[24,100]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %c = f32[24,100]{1,0} parameter(2)
  %view = f32[24,100]{1,0} bitcast(%c)
  %row = f32[1,100]{1,0} fusion(%p, %n), kind=kLoop, calls=%inner
  ROOT %u = f32[24,100]{1,0} dynamic-update-slice(%view, %row, %n, %n)
}

ENTRY %main (w: f32[24,100], i: s32[], cache: f32[24,100]) -> f32[24,100] {
  %w = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %cache = f32[24,100]{1,0} parameter(2)
  ROOT %f = f32[24,100]{1,0} fusion(%w, %i, %cache), kind=kLoop, calls=%outer
}
"""
    # Reads a row and the index, writes a row; reads nothing of the cache.
    assert cost(text).hbm == 400 + 4 + 400


def test_slice_into_vmem_reads_hbm() -> None:
    text = """
ENTRY %main (w: f32[24,100], i: s32[]) -> f32[1,100] {
  %w = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,100]{1,0:S(1)} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={1,100}
}
"""
    assert cost(text).hbm == 400
    assert cost(text.replace("0:S(1)", "0")).hbm == 800


def test_bitcast_fusion_reads_nothing_itself() -> None:
    text = """
%rename (r: f32[100]) -> f32[10,10] {
  %r = f32[100]{0} parameter(0)
  ROOT %b = f32[10,10]{1,0} bitcast(%r)
}

%outer (p: f32[100]) -> f32[10,10] {
  %p = f32[100]{0} parameter(0)
  %same = f32[10,10]{1,0} fusion(%p), kind=kLoop, calls=%rename
  ROOT %n = f32[10,10]{1,0:S(1)} negate(%same)
}

ENTRY %main (a: f32[100]) -> f32[10,10] {
  %a = f32[100]{0} parameter(0)
  ROOT %f = f32[10,10]{1,0:S(1)} fusion(%a), kind=kLoop, calls=%outer
}
"""
    assert cost(text).hbm == 400


def test_async_copies_and_collectives() -> None:
    text = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

ENTRY %main (a: f32[1000]) -> f32[4000] {
  %a = f32[1000]{0} parameter(0)
  %start = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[1000]{0:S(1)} copy-done(%start)
  %begin = ((f32[1000]{0}), f32[10]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:10]}
  %some = f32[10]{0:S(1)} slice-done(%begin)
  %sum = f32[1000]{0:S(1)} all-reduce(%near), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %all = f32[4000]{0:S(1)} all-gather(%sum), dimensions={0}
}
"""
    found = cost(text)
    # The copy reads all of a, the slice ten numbers.
    assert found.hbm == 4000 + 40
    assert found.collectives == {"all-reduce": 4000, "all-gather": 16000}


def test_conditional_counts_cheapest_branch() -> None:
    text = """
%small (p: f32[1]) -> f32[1] {
  %p = f32[1]{0} parameter(0)
  ROOT %n = f32[1]{0} negate(%p)
}

%large (q: f32[1]) -> f32[1] {
  %q = f32[1]{0} parameter(0)
  %m = f32[1]{0} negate(%q)
  ROOT %k = f32[1]{0} negate(%m)
}

ENTRY %main (i: s32[], a: f32[1]) -> f32[1] {
  %i = s32[] parameter(0)
  %a = f32[1]{0} parameter(1)
  ROOT %c = f32[1]{0} conditional(%i, %a, %a), branch_computations={%small, %large}
}
"""
    assert cost(text).hbm == 8
    several = text.replace("{%small, %large}", "{%small, %large, %small}")
    assert [hlo.parse(several, branch=branch).cost.hbm for branch in (0, 1, -1)] == [8, 16, 8]


def test_kernel_attributes_of_several_lines() -> None:
    text = """
ENTRY %main (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %kernel.1 = f32[8,128]{1,0:T(8,128)} custom-call(%p.1), custom_call_target="tpu_custom_call", metadata={
"sizes":"{\\"rows\\": 8
}}, metadata={op_name="a = b"}
  ROOT %copy.1 = f32[8,128]{1,0:T(8,128)} copy(%kernel.1)
}
"""
    assert cost(text).hbm == 4 * 4096


def test_parse_refuses_text_without_entry() -> None:
    with pytest.raises(ValueError, match="entry computation"):
        hlo.parse("HloModule nothing\n")


def test_overlapped_collective_counts_once() -> None:
    text = """
%start (p: f32[10]) -> (f32[10], f32[80], u32[]) {
  %p = f32[10]{0} parameter(0)
  %gather = f32[80]{0} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %s = (f32[10]{0}, f32[80]{0}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a: f32[10], b: f32[80], c: u32[], x: f32[6]) -> (f32[6], f32[10], f32[80], f32[80]) {
  %a = f32[10]{0} parameter(0)
  %b = f32[80]{0} parameter(1)
  %c = u32[]{:S(2)} parameter(2)
  %x = f32[6]{0} parameter(3)
  %further = f32[80]{0} all-gather(%a), channel_id=3, dimensions={0}
  %y = f32[6]{0} negate(%x)
  ROOT %t = (f32[6]{0}, f32[10]{0}, f32[80]{0}, f32[80]{0}) tuple(%y, %a, %b, %further)
}

%done (d: f32[10], e: f32[80]) -> f32[80] {
  %d = f32[10]{0} parameter(0)
  %e = f32[80]{0} parameter(1)
  %last = f32[80]{0} all-gather(%d), channel_id=3, dimensions={0}
  ROOT %r = f32[80]{0} custom-call(%d, %e, %last), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[10], x: f32[6]) -> f32[80] {
  %p = f32[10]{0} parameter(0)
  %x = f32[6]{0} parameter(1)
  %s = (f32[10]{0}, f32[80]{0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %a = f32[10]{0} get-tuple-element(%s), index=0
  %b = f32[80]{0} get-tuple-element(%s), index=1
  %c = u32[]{:S(2)} get-tuple-element(%s), index=2
  %w = (f32[6]{0}, f32[10]{0}, f32[80]{0}, f32[80]{0}) fusion(%a, %b, %c, %x), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%async_collective_fusion.1
  %d = f32[10]{0} get-tuple-element(%w), index=1
  %e = f32[80]{0} get-tuple-element(%w), index=3
  ROOT %r = f32[80]{0} fusion(%d, %e), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
}
"""  # noqa: E501
    found = cost(text)
    assert found.collectives == {"all-gather": 320}
    assert found.overlapped == 320
    # The gather's operand and result once; reads x, writes y.
    assert found.hbm == 40 + 320 + 24 + 24


def test_collective_of_a_sparse_core_overlaps_as_far_as_there_is_work() -> None:
    text = """
%called.1 (p: f32[10], t: token[]) -> f32[80] {
  %t = token[] parameter(1)
  %p = f32[10]{0} parameter(0)
  ROOT %gather = f32[80]{0} all-gather(%p), channel_id=3, dimensions={0}
}, execution_thread="sparsecore"

%product (p: f32[6]) -> f32[6] {
  %p = f32[6]{0} parameter(0)
  ROOT %n = f32[6]{0} negate(%p)
}

ENTRY %main (a: f32[10], b: f32[10], x: f32[6]) -> f32[80] {
  %a = f32[10]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %x = f32[6]{0} parameter(2)
  %t = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %s1 = ((f32[10]{0}, token[]), f32[80]{0}) call-start(%a, %t), async_execution_thread="sparsecore", to_apply=%called.1
  %s2 = ((f32[10]{0}, token[]), f32[80]{0}) call-start(%b, %t), async_execution_thread="sparsecore", to_apply=%called.1
  %y = f32[6]{0} fusion(%x), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"100"}}
  %d1 = f32[80]{0} call-done(%s1)
  ROOT %d2 = f32[80]{0} call-done(%s2)
}
"""
    # In 100 cycles 400 bytes: the first gather's 320 and 80 of the second's.
    found = cost(text, bytes_per_cycle=4)
    assert found.collectives == {"all-gather": 640}
    assert found.overlapped == 400
    assert found.hbm == 2 * (40 + 320) + 24 + 24


def test_sliced_all_reduce_counts_as_reduce_scatter() -> None:
    text = """
%all-reduce-scatter.2 (p: f32[80]) -> f32[10] {
  %p = f32[80]{0} parameter(0)
  %sum = f32[80]{0} all-reduce(%p), channel_id=4
  %zero = s32[] constant(0)
  ROOT %part = f32[10]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={10}
}

ENTRY %main (p: f32[80]) -> f32[10] {
  %p = f32[80]{0} parameter(0)
  ROOT %r = f32[10]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
}
"""
    found = cost(text)
    assert found.collectives == {"reduce-scatter": 320}
    assert not found.overlapped
    assert found.hbm == 320 + 40
