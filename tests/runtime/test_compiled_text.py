"""What is read from the text of compiled programs, on one as the TPU compiler writes it."""

from tljax.runtime.compiled import (
    Collective,
    Memory,
    count_bytes,
    count_instructions,
    estimated_cycles,
    read_collectives,
)

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  %x.1 = bf16[]{:T(256)} parameter(0)
  %y.1 = bf16[]{:T(256)} parameter(1)
  ROOT %add.1 = bf16[]{:T(256)} add(%x.1, %y.1)
}

%fused_computation (p.1: f32[8,4]) -> f32[8,4] {
  %p.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %copy.9 = f32[8,4]{1,0:T(8,128)} copy(%p.1), backend_config={"estimated_cycles":"7"}
  ROOT %gather.1 = f32[8,4]{1,0:T(8,128)} gather(%copy.9, %copy.9), offset_dims={1}
}

%region_body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %gte.1 = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%gte.1), kind=kLoop, calls=%fused_computation, \
backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"100"}}
  %all-gather-start = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%fusion.1), dimensions={0}
  %all-gather-done = f32[64,4]{1,0:T(8,128)} all-gather-done(%all-gather-start)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,4]{1,0}) tuple(%gte.0, %fusion.1)
}

%region_cond (arg.2: (s32[], f32[8,4])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.2, %constant.1), direction=LT
}

ENTRY %main.5_spmd (param.0: f32[8,4], /*index=1*/param.1: bf16[16]) -> f32[8,4] {
  %param.0 = f32[8,4]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %param.1 = bf16[16]{0:T(256)} parameter(1), sharding={devices=[8,1]<=[8]}
  %tuple.2 = (s32[]{:T(128)}, f32[8,4]{1,0}) tuple(%constant.0, %param.0)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%tuple.2), condition=%region_cond, \
body=%region_body, backend_config={"known_trip_count":{"n":"5"}}
  %gte.3 = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%while.1), index=1
  %all-reduce.1 = (f32[8,4]{1,0:T(8,128)S(1)}, bf16[16]{0}) all-reduce(%gte.3, %param.1), \
channel_id=2, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
  %recv.1 = (bf16[2,8]{1,0}, u32[], token[]) recv(%after-all), channel_id=3, \
is_host_transfer=true, frontend_attributes={handler="xla_megascale_runtime"}
  %recv-done.1 = (bf16[2,8]{1,0}, token[]) recv-done(%recv.1), channel_id=3, \
is_host_transfer=true, frontend_attributes={handler="xla_megascale_runtime"}
  ROOT %fusion.2 = f32[8,4]{1,0:T(8,128)} fusion(%gte.4), kind=kOutput, calls=%fused_computation, \
backend_config={"window_config":{"estimated_cycles":"11"}}
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    assert read_collectives(TEXT) == {
        "all-reduce": Collective(1, 128 + 32, {"f32": 128, "bf16": 32}),
        "all-gather": Collective(5, 5 * 1024, {"f32": 5 * 1024}),
        "inter-slice transfer": Collective(1, 32, {"bf16": 32}),
    }


def test_cycles_are_those_of_the_instructions_that_run_and_not_of_parts_of_fusions():
    assert estimated_cycles(TEXT) == 5 * 100 + 11
    assert estimated_cycles("ENTRY %main (x: f32[]) -> f32[] {\n}") is None


def test_bytes_are_operands_and_results_of_what_runs():
    gather, fusion = 128 + (128 + 1024), 128 + 128
    all_reduce = 2 * (128 + 32)
    # The operand of the last fusion is not in the text.
    received = 32 + 4
    assert count_bytes(TEXT) == 5 * (fusion + gather) + all_reduce + received + 128


def test_instructions_are_counted_by_operation():
    counts = count_instructions(TEXT)
    assert (counts["fusion"], counts["gather"], counts["copy"], counts["while"]) == (2, 1, 1, 1)


def test_the_memory_of_a_program_is_the_sum_of_its_kinds():
    assert Memory(arguments=4, outputs=3, temporaries=2, code=1).total == 10
