"""Work, traffic and time read from the text of programs whose figures are known."""

import numpy as np
import pytest

from interns1pro_jax.flops import HARDWARE
from interns1pro_jax.kernel_times import ATTENTION_TIME_OVER_BOUND, KERNEL_TIME_OVER_BOUND, ROTARY_TIME_OVER_BOUND
from interns1pro_jax.train import aot, hlo, hlo_cost
from interns1pro_jax.train.timeline import FROM_HOST, TO_HOST, Links, Player

# A loop of 7 whose body multiplies [8, 16] by [16, 32], with a gather over groups of two that goes on meanwhile, and one that does not.
TEXT = """HloModule step, is_scheduled=true

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]) parameter(0)
  %limit = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%product (x: bf16[8,16], w: bf16[16,32]) -> f32[8,32] {
  %x = bf16[8,16] parameter(0)
  %w = bf16[16,32] parameter(1)
  ROOT %dot = f32[8,32] convolution(%x, %w), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[], bf16[8,16]) parameter(0)
  %x.1 = bf16[8,16] get-tuple-element(%p.1), index=1
  %start = (bf16[8,16], bf16[16,16]) all-gather-start(%x.1), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %w.1 = bf16[16,32] constant({...})
  %fusion = f32[8,32] fusion(%x.1, %w.1), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %done = bf16[16,16] all-gather-done(%start)
  %again = bf16[16,16] all-gather(%x.1), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %result = (s32[], bf16[8,16]) tuple(%i.1, %x.1)
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x.2 = bf16[8,16] parameter(0)
  %zero = s32[] constant(0)
  %kernel = bf16[8,16] custom-call(%x.2), custom_call_target="tpu_custom_call", backend_config={COST}
  %initial = (s32[], bf16[8,16]) tuple(%zero, %kernel)
  %while = (s32[], bf16[8,16]) while(%initial), condition=%condition, body=%body
  ROOT %out = bf16[8,16] get-tuple-element(%while), index=1
}
""".replace("{COST}", '{"cost_estimate":{"flops":"4000000","bytes_accessed":"1000"}}')
GATHERED, CLOCK = 16 * 16 * 2, 1.75e9


def test_work_in_loops_counts_as_often_as_they_run():
    program = hlo.computations(TEXT)
    assert hlo.executions(program)["body"] == hlo.executions(program)["product"] == 7
    assert hlo_cost.product_flops(program) == (7 * 2 * 8 * 16 * 32, 4_000_000)
    moved = 8 * 16 * 2 + 16 * 32 * 2 + 8 * 32 * 4  # of the product; the gathers read a row block and write two
    gathers = 2 * (8 * 16 * 2) + GATHERED + (8 * 16 * 2 + GATHERED) + GATHERED + (8 * 16 * 2 + GATHERED)
    assert hlo_cost.traffic(program) <= 1000 + 7 * (moved + gathers)
    assert hlo_cost.traffic(program) >= 1000 + 7 * moved


@pytest.mark.parametrize(
    ("attributes", "lhs", "rhs", "out", "products"),
    [
        # A batch of 4 as a spatial dimension, by dilation: every output has one tap.
        ("window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", (4, 5, 6), (4, 6, 7), (4, 5, 7), 4 * 5 * 6 * 7),
        # The same by padding: the second operand's 4 slide over one.
        ("window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", (5, 6, 1), (6, 4, 7), (5, 4, 7), 4 * 5 * 6 * 7),
        # A true convolution of width 3 with padding of 1: two taps at the ends.
        ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (1, 10, 6), (3, 6, 7), (1, 10, 7), (3 * 8 + 2 * 2) * 6 * 7),
    ],
)  # fmt: skip
def test_taps_on_padding_do_not_count(attributes, lhs, rhs, out, products):
    shapes = [f"bf16[{','.join(map(str, shape))}]" for shape in (lhs, rhs, out)]
    text = f"""ENTRY %main (a: f32[]) -> f32[] {{
  %a = {shapes[0]} parameter(0)
  %b = {shapes[1]} parameter(1)
  ROOT %c = {shapes[2]} convolution(%a, %b), {attributes}
}}"""
    assert hlo_cost.product_flops(hlo.computations(text)) == (2 * products, 0)


needs_topologies = pytest.mark.skipif(not aot.can_compile(), reason="the devices of a TPU pod come from libtpu (Linux on x86-64)")


@needs_topologies
class TestTimes:
    @pytest.mark.parametrize("cycles", [1, 10**6])
    def test_a_step_waits_for_what_is_not_done(self, cycles):
        mesh = aot.pod_mesh("v5p:2x2x2", fsdp=4, expert=2)
        times = Player(TEXT.replace("CYCLES", str(cycles)), mesh, HARDWARE["v5p"]).times()
        transfer = GATHERED / 2 / HARDWARE["v5p"].link
        computing = 7 * cycles / CLOCK
        kernel = KERNEL_TIME_OVER_BOUND["v5p"] * 4_000_000 / HARDWARE["v5p"].peak
        assert np.isclose(times.xla, computing) and np.isclose(times.kernels, kernel)
        assert np.isclose(times.links[("expert",)], 14 * transfer)
        assert np.isclose(times.waiting, 7 * (transfer + max(0, transfer - cycles / CLOCK)))
        assert np.isclose(times.step, times.compute + times.waiting)

    @pytest.mark.parametrize(
        ("name", "over"),
        [
            ("splash_mha_fwd_segmented_residuals.18", ATTENTION_TIME_OVER_BOUND["splash_mha_fwd"]),
            ("splash_mha_dkv_segmented.2", ATTENTION_TIME_OVER_BOUND["splash_mha_d"]),
            ("attention_forward.3", ATTENTION_TIME_OVER_BOUND["attention_forward"]),
            ("attention_gradient", ATTENTION_TIME_OVER_BOUND["attention_gradient"]),
            ("norm_and_rotary.1", ROTARY_TIME_OVER_BOUND["norm_and_rotary"]),
            ("norm_and_rotary_gradient.1", ROTARY_TIME_OVER_BOUND["norm_and_rotary_gradient"]),
        ],
    )
    def test_kernels_of_known_schedules_are_known_by_name(self, name, over):
        text = TEXT.replace("CYCLES", "1").replace("%kernel", f"%{name}")
        times = Player(text, aot.pod_mesh("tpu7x:2x2x1", fsdp=4, expert=2), HARDWARE["tpu7x"]).times()
        assert np.isclose(times.kernels, over["tpu7x"] * 4_000_000 / HARDWARE["tpu7x"].peak)

    def test_a_whole_dimension_of_the_torus_has_two_links_and_a_part_has_one(self):
        collective = hlo.Collective("", "all-gather", "", 2**30, ("expert",), 1, True)
        link = HARDWARE["v5p"].link
        ring = Player(TEXT, aot.pod_mesh("v5p:4x4x8", fsdp=16, expert=8), HARDWARE["v5p"])
        assert np.isclose(ring.transfer(collective), 2**30 * 7 / 8 / (2 * link))
        part = Player(TEXT, aot.pod_mesh("v5p:4x4x8", fsdp=64, expert=2), HARDWARE["v5p"])
        assert np.isclose(part.transfer(collective), 2**30 / 2 / link)

    def test_devices_of_a_chip_share_what_comes_in(self):
        """An expert group of eight on four chips of two devices: three quarters come from other chips, once for both."""
        player = Player(TEXT, aot.pod_mesh("tpu7x:4x4x4", fsdp=16, expert=8), HARDWARE["tpu7x"])
        collective = hlo.Collective("", "all-gather", "", 2**30, ("expert",), 1, True)
        assert np.isclose(player.transfer(collective), 2**30 * 3 / 4 / (2 * HARDWARE["tpu7x"].link))

    @pytest.mark.parametrize("cycles", [1, 10**6])
    def test_what_goes_to_the_host_and_comes_from_it_takes_the_bus(self, cycles):
        """Each way a part of 2 MiB; both are waited for where they end, and what is not started ahead at once."""
        stack, part = "bf16[8,1024,1024]{2,1,0:S(5)}", "bf16[1,1024,1024]{2,1,0}"
        text = f"""ENTRY %main (a: f32[]) -> f32[] {{
  %stack = {stack} parameter(0)
  %part = {part} parameter(1)
  %i = s32[] parameter(2)
  %put = (({stack}, {part}, s32[]), {stack}, u32[]) dynamic-update-slice-start(%stack, %part, %i, %i, %i)
  %get = (({stack}, s32[]), {part}, u32[]) dynamic-slice-start(%stack, %i, %i, %i), dynamic_slice_sizes={{1,1024,1024}}
  %meanwhile = s32[] negate(%i), backend_config={{"estimated_cycles":"{cycles}"}}
  %put_end = {stack} dynamic-update-slice-done(%put)
  %get_end = {part} dynamic-slice-done(%get)
  ROOT %now = {part} dynamic-slice(%put_end, %i, %i, %i), dynamic_slice_sizes={{1,1024,1024}}
}}"""
        times = Player(text, aot.pod_mesh("v5p:2x2x1", fsdp=4), HARDWARE["v5p"]).times()
        transfer = 2**21 / HARDWARE["v5p"].host_link
        assert np.isclose(times.links[TO_HOST], transfer) and np.isclose(times.links[FROM_HOST], 2 * transfer)
        assert np.isclose(times.waiting, transfer + max(0, transfer - cycles / CLOCK))

    @pytest.mark.parametrize("depth", [0, 1, 2])
    def test_a_collective_inside_calls_of_what_is_started_goes_on_meanwhile(self, depth):
        array, gathered = "bf16[1024,1024]{1,0}", "bf16[4096,1024]{1,0}"
        calls = "".join(
            f"""%inner{level} (x: bf16[]) -> bf16[] {{
  %x{level} = {array} parameter(0)
  ROOT %call{level} = {gathered} call(%x{level}), to_apply=%inner{level + 1}
}}

"""
            for level in range(depth)
        )
        # What is called comes first in a program's text.
        calls = "\n\n".join(reversed(calls.strip().split("\n\n")))
        text = f"""%inner{depth} (x: bf16[]) -> bf16[] {{
  %x = {array} parameter(0)
  ROOT %gather = {gathered} all-gather(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, use_global_device_ids=true
}}

{calls}

ENTRY %main (a: f32[]) -> f32[] {{
  %a = {array} parameter(0)
  %start = (({array}), {gathered}, u32[]) async-start(%a), calls=%inner0
  %meanwhile = s32[] negate(%a), backend_config={{"estimated_cycles":"1000000"}}
  ROOT %end = {gathered} async-done(%start)
}}"""
        mesh = aot.pod_mesh("v5p:2x2x1", fsdp=4)
        (collective,) = hlo.collectives(text, mesh)
        assert collective.asynchronous
        times = Player(text, mesh, HARDWARE["v5p"]).times()
        assert times.links[("fsdp",)] > 0 and times.waiting == max(0, times.links[("fsdp",)] - 1e6 / CLOCK)


def test_links_take_what_was_sent_ahead_in_order_and_share_with_what_is_waited_for():
    links = Links()
    for name, axis, seconds in (("large", "x", 2.0), ("behind", "x", 1.0), ("elsewhere", "y", 5.0)):
        links.send(name, (axis,), seconds, ahead=True)
    links.run(1.0)
    links.send("now", ("x",), 0.5, ahead=False)
    assert links.wait("now") == 1.0  # half of the links; the other half serves the large one
    assert links.wait("behind") == 1.5 and links.wait("large") == 0.0
    assert links.wait("elsewhere") == 1.5 and links.clock == 5.0
    assert links.busy == {("x",): 3.5, ("y",): 5.0}


def test_attention_kernels_cost_half_of_all_scores_and_the_diagonal():
    """64 query heads of 128 over 4,096 tokens in blocks of 1,024: of 16 blocks ten are visited, twice in the forward."""
    operands = "s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}, bf16[64,4096,128]{2,1,0}, bf16[4,4096,128]{2,1,0}, bf16[4,4096,128]{2,1,0}"
    text = f"""ENTRY %main (a: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  ROOT %splash_mha_fwd_residuals.1 = bf16[64,4096,128] custom-call(%a), operand_layout_constraints={{{operands}}}, backend_config={{}}
}}"""
    assert hlo_cost.product_flops(hlo.computations(text)) == (0, 2 * 2 * 64 * 4096 * 4096 * 128 * 10 / 16)
