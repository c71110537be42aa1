"""The report on kernels: reading static schedules, simulating transfers and compute, counting work, and the command itself."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from tools import kernel_report
from tools.kernels import fp8, peers
from tools.kernels.cases import Case, Work
from tools.kernels.chips import CHIPS
from tools.kernels.compile import Compilation, CompileError, Launch, scoped_vmem
from tools.kernels.kept import Kept, as_json, from_json
from tools.kernels.parts import Parts, divide
from tools.kernels.pipeline import Visit, pipelined
from tools.kernels.products import PRODUCTS, SIZES, group_sizes
from tools.kernels.report import Report, Runner, Sum
from tools.kernels.schedule import Schedule, ScheduleError, read_schedules
from tools.kernels.simulate import Memory, Program, ProgramError, Step, simulate
from tools.kernels.table import verdict

# -- Reader --------------------------------------------------------------------------------------------------------------------------

NEW = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
OLD = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"

# (bundle, units that it uses, cycles until the next); two products of 8 cycles each on two matrix units in the branch of a loop.
BUNDLES = (
    ("{ %1 = sld [smem:[#a]] } /* Start region 1 */", {"SALU": 1}, 1),
    ("{ %2 = vld [vmem:[%s1]] ;; %3 = dma.hbm_to_vmem [thread:$0] } /* Start region 2 */", {"VLOAD": 1}, 3),
    ("{ %4 = sbr.rel (%p1) target = $region4 }", {"SALU": 1}, 2),
    ("{ %5 = vmatmul.bf16.gmra.mxu0 %v1 ;; %6 = vld [fill] } /* Start region 3 */", {"VLOAD": 1, "VLOAD:FILL": 1}, 2),
    ("{ %7 = vmatmul.bf16.gmra.mxu1 %v1 ;; %8 = vst [spill] } /* End region 3 */", {"VSTORE": 1, "VSTORE:SPILL": 1}, 8),
    ("{ %9 = sadd.s32 1, %s1 } /* Start/End empty region 4 */", {"SALU": 1}, 1),
    ("{ %10 = sbr.rel (!%p2) target = $region2\n /* of two lines */ }", {"SALU": 1}, 4),
    ("{ %11 = vst [out] } /* Start region 5 */", {"VSTORE": 1}, 1),
)


def write_dump(directory, columns=NEW, bundles=BUNDLES):
    """A dump as libtpu writes it, of a kernel named `toy`."""
    names = [name.strip() for name in columns.split(",")]
    used = [[units.get(name, 0) for name in names] for _, units, _ in bundles]
    first = np.concatenate([[0], np.cumsum([cycles for _, _, cycles in bundles])])
    per_cycle = np.zeros((first[-1], len(names)), int)
    per_cycle[first[:-1]] = used
    for place, (text, _, _) in enumerate(bundles):
        if "vmatmul" in text:
            per_cycle[first[place] : first[place] + 8, 0] += 1
    head = f"== CAPACITY:\n{columns}\n{' '.join(['2'] * len(names))}\n== UTILIZATION:\n"
    for label, rows in (("00-pre-delay", per_cycle), ("01-final", used)):
        body = "\n".join(" ".join(map(str, row)) for row in rows)
        (directory / f"7-toy-{label}_hlo-static-per-bundle-utilization.txt").write_text(head + body + "\n")
    analysis = '%toy = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call"\n'
    (directory / "7-toy-02-schedule-analysis_final_bundles.txt").write_text(analysis)
    lines = [f"{hex(place) if place else '   0'}   : > {text}" for place, (text, _, _) in enumerate(bundles)]
    (directory / "7-toy-03-final_bundles.txt").write_text("= control target key start\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("columns", [NEW, OLD], ids=["libtpu 0.0.52", "libtpu 0.0.42"])
def test_cycles_are_those_before_delays_were_folded(tmp_path, columns):
    write_dump(tmp_path, columns)
    (tmp_path / "6-TLP-02-schedule-analysis_final_bundles.txt").write_text('%other = custom-call, custom_call_target="tpu_custom_call"')
    (schedule,) = read_schedules(tmp_path)
    assert schedule.name == "toy"
    (loop,) = schedule.root.children
    (branch,) = loop.children
    assert [(region.kind, region.start, region.end) for region in schedule.root.walk()] == [
        ("kernel", 0, 8),
        ("loop", 1, 7),
        ("branch", 3, 5),
    ]
    assert [region.total.cycles for region in schedule.root.walk()] == [22, 20, 10]
    assert [region.own.cycles for region in schedule.root.walk()] == [2, 10, 10]
    assert (branch.own.matmuls, branch.own.matrix_cycles, branch.own.matrix_use) == (2, 8.0, 0.8)
    assert (branch.own.spills, branch.own.fills, loop.own.transfers) == (1, 1, 1)
    assert schedule.hot_regions() == [branch]
    assert "2 matmuls = 8 matrix cycles, use 0.800" in schedule.root.tree()


def test_a_branch_to_a_region_that_is_gone_skips_what_follows_it(tmp_path):
    text, units, cycles = BUNDLES[5]
    gone = text.replace("Start/End empty region 4", "End region 9")
    write_dump(tmp_path, bundles=(*BUNDLES[:5], (gone, units, cycles), *BUNDLES[6:]))
    (schedule,) = read_schedules(tmp_path)
    assert [(region.kind, region.start, region.end) for region in schedule.root.walk()][2] == ("branch", 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dump: (dump / "7-toy-01-final_hlo-static-per-bundle-utilization.txt").unlink(), "kernel toy: 0 files"),
        (lambda dump: write_dump(dump, NEW.replace("MATMUL", "OTHER")), "no column MATMUL or MXU"),
        (lambda dump: write_dump(dump, bundles=(*BUNDLES, ("{ sbr.rel target = $region77 }", {"SALU": 1}, 1))), "region 77"),
        (lambda dump: write_dump(dump, bundles=(*BUNDLES, ("{ sbr.abs %s1 }", {"SALU": 1}, 1))), "branch of unknown form"),
    ],
)
def test_what_is_not_understood_is_an_error(tmp_path, change, message):
    write_dump(tmp_path)
    change(tmp_path)
    with pytest.raises(ScheduleError, match=message):
        read_schedules(tmp_path)


def test_schedules_that_do_not_match_are_an_error(tmp_path):
    write_dump(tmp_path)
    path = tmp_path / "7-toy-01-final_hlo-static-per-bundle-utilization.txt"
    lines = path.read_text().splitlines()
    lines[4] = " ".join(["2"] * 11)
    path.write_text("\n".join(lines))
    with pytest.raises(ScheduleError, match="do not match"):
        read_schedules(tmp_path)


def test_scoped_vmem_is_that_of_the_kernel():
    module = """
  %fusion = f32[8] fusion(%x), backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"99"}]}
  ROOT %toy.1 = bf16[8] custom-call(%fusion), custom_call_target="tpu_custom_call",
    backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
"""
    assert scoped_vmem(module) == {"toy.1": 4096}


# -- Simulation ----------------------------------------------------------------------------------------------------------------------

CHIP = CHIPS["v6e"]
SECOND = CHIP.clock  # cycles
GIGA = CHIP.hbm  # bytes of a second


def run(steps, memory=None, chip=CHIP):
    return simulate(Program((steps,)), chip, memory or Memory())


def random_steps(rng, count=40):
    """Steps that fetch one to three steps ahead and write now and then; some need no transfer at all."""
    issues = [[] for _ in range(count + 1)]
    waits = [[] for _ in range(count + 1)]
    for step in range(1, count + 1):
        if rng.random() < 0.7:
            issues[max(0, step - rng.integers(1, 4))].append((("in", step), rng.random() * GIGA))
            waits[step].append(("in", step))
    steps = []
    for step in range(count + 1):
        writes = ((("out", step), rng.random() * GIGA),) if rng.random() < 0.3 else ()
        steps.append(Step(rng.random() * SECOND, tuple(waits[step]), tuple(issues[step]), writes))
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_time_lies_between_its_bounds(seed):
    steps = random_steps(np.random.default_rng(seed))
    compute = sum(step.compute_cycles for step in steps) / CHIP.clock
    moved = Program((steps,)).bytes / CHIP.hbm
    outcome = run(steps)
    assert outcome.compute == pytest.approx(compute) and outcome.queue == pytest.approx(moved)
    assert max(compute, moved) <= outcome.time * (1 + 1e-9)
    assert outcome.time <= (compute + moved) * (1 + 1e-9)
    assert outcome.time == pytest.approx(outcome.compute + outcome.stalls)
    assert run(steps, Memory(efficiency=1e12)).time == pytest.approx(compute)
    assert run([Step(0, step.waits, step.issues, step.writes) for step in steps]).time == pytest.approx(moved)
    assert run(steps, Memory(efficiency=0.83)).time >= outcome.time
    assert run(steps, Memory(latency=0.1)).time >= outcome.time


def test_transfers_overlap_compute_but_not_each_other():
    steps = [
        Step(issues=(("a", 2 * GIGA), ("b", 1 * GIGA))),
        Step(2 * SECOND, waits=("a",), issues=(("c", 4 * GIGA),)),  # 2 to 4; b arrives at 3, c at 7
        Step(1 * SECOND, waits=("b", "c"), writes=(("d", 1 * GIGA),)),  # 7 to 8; d is out at 9
    ]
    outcome = run(steps)
    assert (outcome.time, outcome.compute, outcome.stalls, outcome.queue) == pytest.approx((9, 3, 6, 8))
    assert run(steps, Memory(latency=1)).time == pytest.approx(13)


def test_cores_share_the_bandwidth_and_the_slowest_counts():
    chip = CHIPS["v5p"]
    fast, slow = [Step(issues=(("a", chip.hbm),))], [Step(issues=(("a", 2 * chip.hbm),))]
    assert simulate(Program((fast, slow)), chip, Memory()).time == pytest.approx(4)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step(waits=("a",), issues=(("a", 1),))], "step 0 waits for transfer a"),
        ([Step(issues=(("a", 1),)), Step(writes=(("a", 1),))], "step 1 puts transfer a on the queue again"),
    ],
)
def test_programs_that_cannot_run_are_errors(steps, message):
    with pytest.raises(ProgramError, match=message):
        run(steps)


def visits(count, cycles, size, out):
    return [Visit(cycles, 1.0, {"x": (place, size), "w": (0, size)}, (place, out)) for place in range(count)]


def test_a_pipeline_hides_transfers_behind_compute():
    buffers = {"x": 2, "w": 2}
    shown = run(pipelined(visits(10, SECOND, GIGA / 4, GIGA / 4), buffers))
    assert shown.time == pytest.approx(0.5 + 10 + 0.25)  # first blocks, compute, last write
    bound = run(pipelined(visits(10, SECOND / 100, GIGA, GIGA), buffers))
    assert bound.queue == pytest.approx(21)  # an operand whose block stays is fetched once
    assert 21 <= bound.time < 21.1


def test_more_buffers_never_slow_a_pipeline():
    rng = np.random.default_rng(0)
    uneven = [Visit(rng.random() * SECOND, 1.0, {"x": (place, rng.random() * GIGA)}, (place, 0.0)) for place in range(50)]
    times = [run(pipelined(uneven, {"x": count})).time for count in (2, 3, 4)]
    assert times == sorted(times, reverse=True) and times[0] > times[2]


# -- Work ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_of_groups_sum_to_the_rows(kind):
    assert group_sizes(8192, kind).sum() == 8192 and len(group_sizes(8192, kind)) == 64


def test_rooflines():
    work = PRODUCTS["up_fwd"].work(32768)
    chip = CHIPS["v5p"]
    assert work.bound(chip, Memory()) == "MXU"
    assert work.roofline(chip, Memory()) == pytest.approx(2 * 32768 * 4096 * 3072 / 459e12)
    few = PRODUCTS["up_fwd"].work(64)
    assert few.bound(chip, Memory()) == "HBM"
    assert few.roofline(chip, Memory(efficiency=0.5)) == pytest.approx(2 * few.roofline(chip, Memory()))


def test_least_operations_are_whole_packs_and_whole_contractions():
    chip, sizes = CHIPS["v6e"], np.array([0, 1, 16, 17, 256, 257])
    assert PRODUCTS["up_fwd"].least_flops(chip, sizes) == 2 * (0 + 16 + 16 + 32 + 256 + 272) * 4096 * 3072
    assert PRODUCTS["up_drhs"].least_flops(chip, sizes) == 2 * (0 + 256 + 256 + 256 + 256 + 512) * 4096 * 3072


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_time_add_up_to_it(chip, seed):
    peak = chip.flops["bfloat16"]
    of_core = peak / chip.cores / chip.clock  # operations of a cycle at full use
    rng = np.random.default_rng(seed)
    cores = tuple(
        [dataclasses.replace(step, flops=rng.random() * step.compute_cycles * of_core) for step in random_steps(rng)]
        for _ in range(chip.cores)
    )
    program = Program(cores)
    outcome, work = simulate(program, chip, Memory()), Work(program.flops / 2, 1.0)
    parts = divide(program, outcome, work, program.flops / 1.5, chip)
    assert sum(parts) == pytest.approx(outcome.time)
    assert min(parts.useful, parts.granularity, parts.overhead) > 0 and parts.waiting == outcome.stalls
    assert parts.useful == pytest.approx(work.flops / peak) and parts.granularity == pytest.approx(parts.useful / 3)
    if chip.cores == 1:
        assert parts.padding == pytest.approx(program.flops / 3 / peak)


@pytest.mark.parametrize(
    ("flops", "message"), [(9.0, "9 operations are modelled, but 10 are needed"), (1e15, "its products take 1.08932 s at full use")]
)
def test_a_program_that_does_too_little_is_an_error(flops, message):
    program = Program(([Step(1.0, flops=flops)],))
    with pytest.raises(ProgramError, match=message):
        divide(program, simulate(program, CHIP, Memory()), Work(8.0, 1.0), 10.0, CHIP)


@pytest.mark.parametrize("seed", range(5))
def test_fixed_tiles_visit_every_group_of_every_tile_once(seed):
    sizes = np.random.default_rng(seed).multinomial(1000, [0.0, 0.4, 0.01, 0.19, 0.0, 0.4])
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    assert peers._tiles_at_fixed_places(sizes, 64) == sorted({(row // 64, int(group)) for row, group in enumerate(group_of_row)})


@pytest.mark.parametrize("seed", range(5))
def test_tiles_of_groups_cover_every_row_once(seed):
    sizes = np.random.default_rng(seed).multinomial(1000, [0.0, 0.4, 0.01, 0.19, 0.0, 0.4])
    covered = [(row, group) for first, end, group in peers._tiles_of_groups(sizes, 128) for row in range(first, end)]
    assert covered == list(enumerate(np.repeat(np.arange(len(sizes)), sizes)))


# -- Report --------------------------------------------------------------------------------------------------------------------------


class FakeCompiler:
    """Compiles everything to the toy kernel except what is called `broken`."""

    def __init__(self, schedule):
        self.compilation = Compilation([schedule], {"toy": 1}, 2, 3.0)
        self.calls = 0

    def compile(self, chip, launch):
        self.calls += 1
        if launch.function == "broken":
            raise CompileError("ValueError: too large")
        return self.compilation


def contender(*names_and_cycles):
    """A contender with a case per (name, cycles of its one step)."""

    def cases(chip, product, rows):
        return [
            Case(
                f"{name} {product.name}",
                lambda chip, name=name: Launch(name, ()),
                Work(10.0, 1.0),
                lambda chip, compilation, sizes, cycles=cycles: Program(([Step(cycles, flops=12.0)],)),
            )
            for name, cycles in names_and_cycles
        ]

    return cases


@pytest.fixture
def schedule(tmp_path) -> Schedule:
    write_dump(tmp_path)
    return read_schedules(tmp_path)[0]


def test_a_kept_compilation_comes_back_as_it_was(schedule, tmp_path):
    compilation = Compilation([schedule, schedule], {"toy": 1 << 20}, 4096, 1.5)
    assert from_json(as_json(compilation)) == compilation
    kept = Kept(tmp_path / "kept")
    places = {kept.place(*of) for of in (("p", CHIP, {}), ("q", CHIP, {}), ("p", CHIPS["v5p"], {}), ("p", CHIP, {"limit": "1"}))}
    assert len(places) == 4 and kept.place("p", CHIP, {}) in places


def test_the_best_case_counts_and_what_fails_is_kept(schedule):
    compiler = FakeCompiler(schedule)
    lines = []
    runner = Runner(compiler, Memory(), lines.append)
    contenders = {"mine": contender(("slow", 200.0), ("fast", 100.0), ("broken", 1.0)), "none": contender(("broken", 1.0))}
    runner.grouped(contenders, [CHIP], [PRODUCTS["up_fwd"], PRODUCTS["dn_fwd"]], [8192, 32768], ["rnd", "eq"])
    report: Report = runner.report
    assert compiler.calls == len(lines) == 6  # once per case, whatever the rows and sizes
    assert {record.case for record in report.best()} == {"fast up_fwd", "fast dn_fwd"}
    assert {record.error for record in report.compiled if "broken" in record.case} == {"ValueError: too large"}
    sums = report.sums(["up_fwd", "dn_fwd"], {"mine": ["mine"], "none": ["none"]})
    assert len(sums) == 4 and {total.kernel for total in sums} == {"mine"}
    assert sums[0].time == pytest.approx(200 / CHIP.clock) and sums[0].work == pytest.approx(1.2) and not sums[0].missing
    assert report.sums(["up_fwd", "up_drhs"], {"mine": ["mine"]})[0].missing == ("up_drhs",)


def total(time, rows=32768, missing=(), least=1.05, products=tuple(PRODUCTS)):
    return Sum("v6e", rows, "rnd", "best peers", 1.0, least, time, 1.0, 1.0, Parts(useful=time), products, missing)


@pytest.mark.parametrize(
    ("mine", "peer", "text"),
    [
        (total(1.07), total(1.2), "1.08 met, faster than best peers"),
        (total(1.10), total(1.05), "1.08 MISSED, NOT FASTER than best peers"),
        (total(1.10, least=1.09), total(1.11), "1.08 out of reach, faster than best peers"),
        (total(1.10, rows=8192), None, "1.15 met"),
        (total(1.10, products=("up_drhs", "dn_drhs")), total(1.2), "none, faster than best peers"),
        (total(1.0, missing=("up_fwd",)), None, "-"),
        (None, total(1.0), "-"),
    ],
)
def test_verdicts(mine, peer, text):
    assert verdict(mine, peer) == text


# -- Command -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed, so nothing can be compiled for a TPU")
def test_plain_products_take_the_cycles_that_their_operations_must(tmp_path):
    command = [sys.executable, "-m", "tools.kernel_report", "--kernel", "plain", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text() in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["compiled"]) == len(report["modelled"]) == 9
    for record in report["compiled"]:
        chip = CHIPS[record["chip"]]
        rows, depth, columns = map(int, record["case"].split()[1].split(","))
        (hot,) = record["hot"]
        peak = 2 * rows * depth * columns / hot["matrix_cycles"] * chip.clock * chip.cores
        assert peak == pytest.approx(chip.flops["bfloat16"], rel=1e-3)
        assert hot["matrix_cycles"] < hot["cycles"] < hot["matrix_cycles"] + 450  # filling and draining the units
        assert 0 < record["vmem"] <= chip.vmem and record["code"] > 0
    assert all(record["time"] >= record["roofline"] and record["flops"] == record["needed"] for record in report["modelled"])


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(["--chips", "v9"])
    assert "invalid choice: 'v9'" in capsys.readouterr().err


def test_fp8_products_move_half_the_bytes_of_matrices():
    (product,) = fp8.products([PRODUCTS["dn_dlhs"], PRODUCTS["dn_drhs"]])
    work, in_bfloat16 = product.work(8192), PRODUCTS["dn_dlhs"].work(8192)
    assert work.flops == in_bfloat16.flops
    values = 8192 * 4096 + 64 * 4096 * 1536
    assert work.bytes == values + 4 * (8192 * 32 + 64 * 32 * 12) + 2 * 8192 * 1536
    (case,) = fp8.grouped_matmul_fp8(CHIPS["v6e"], product, 8192)
    assert case.name.startswith("ours dn_dlhs_fp8") and case.work == work
