"""What a named GPU allows: shared memory, threads, registers, clusters, instructions."""

import numpy as np
import pytest

from tests.emulator import Fault, PtxError
from tests.emulator.gpus import GPUS, ctas_per_sm
from tests.emulator.machine import Machine
from tests.emulator.memory import GlobalMemory
from tests.emulator.snippet import program_of, run_ptx, snippet_text


def launch(directives="", body="", target="sm_90a", gpu=None, wide=True, **given):
    from tests.emulator import ptx
    from tests.emulator.program import Program

    text = snippet_text(body, 0, target).replace(")\n{", f")\n{directives}\n{{", 1)
    (kernel,) = ptx.parse(text).values()
    options = {"grid": (1, 1, 1), "block": (32, 1, 1), "cluster": (1, 1, 1), "smem": 0} | given
    machine = Machine(GlobalMemory(), gpu=gpu)
    machine.enqueue(Program(kernel), **options, params=[], non_portable=wide)
    machine.synchronize()
    return machine


@pytest.mark.parametrize(
    ("name", "most"), [("H200", 232448), ("B200", 232448), ("RTX 5090", 101376)]
)
def test_shared_memory_of_a_block(name, most):
    target = GPUS[name].target
    launch(target=target, gpu=name, smem=most)
    with pytest.raises(Fault, match=f"{name}: .* bytes of shared memory .*limit is {most}"):
        launch(target=target, gpu=name, smem=most + 16)
    static = ".shared .align 16 .b8 fixed[1024]; mov.u32 %r1, fixed;"
    with pytest.raises(Fault, match="bytes of shared memory"):
        launch(target=target, gpu=name, smem=most, body=static)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": (1025, 1, 1)}, "1024 threads"),
        ({"block": (1, 1, 65)}, "64 along z"),
        ({"grid": (1, 65536, 1)}, "a grid of"),
        ({"grid": (0, 1, 1)}, r"grid \(0, 1, 1\).*at least 1 along each axis"),
        ({"grid": (17, 1, 1), "cluster": (17, 1, 1)}, "clusters of 17 CTAs, but the limit is 16"),
        ({"grid": (16, 1, 1), "cluster": (16, 1, 1), "wide": False}, "limit is 8"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "not a multiple of the cluster"),
        ({"directives": ".maxnreg 128", "block": (640, 1, 1)}, "128 registers a thread for 640"),
        ({"directives": ".reqntid 64, 1, 1"}, r"kernel says .reqntid 64, 1, 1"),
        ({"directives": ".maxntid 16, 1, 1"}, r"kernel says .maxntid 16, 1, 1"),
        ({"directives": ".reqnctapercluster 2, 1, 1"}, "kernel says .reqnctapercluster"),
    ],
)
def test_launches_that_are_refused(given, message):
    with pytest.raises(Fault, match=message):
        launch(**given)


def test_launches_at_the_limits():
    launch(block=(1024, 1, 1))
    launch(grid=(16, 1, 1), cluster=(16, 1, 1))
    launch(".reqntid 64, 1, 1", block=(64, 1, 1))
    launch(".maxnreg 128", block=(512, 1, 1))


def test_residency():
    assert not launch(".minnctapersm 2", smem=100 << 10).warnings
    (warning,) = launch(".minnctapersm 3", smem=100 << 10).warnings
    assert "H200 holds 2 of its CTAs" in warning


@pytest.mark.parametrize(("smem", "threads", "fit"), [(0, 32, 32), (0, 1024, 2), (116224, 32, 1)])
def test_ctas_of_an_sm(smem, threads, fit):
    class Asked:
        kernel = program_of("").kernel
        smem_end = 1024 + smem + (16 if smem else 0)

    Asked.threads = threads
    assert ctas_per_sm(GPUS["H200"], Asked) == fit


ONLY = {
    "wgmma.fence.sync.aligned;": "sm_90a",
    "tcgen05.wait::ld.sync.aligned;": "sm_100a sm_103a",
    "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.cta_group::2 "
    "[%r9], [%d0, {%r1, %r2}], [%r9];": "sm_100a sm_103a",
    "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group "
    "[%d0, {%r1, %r2, %r3, %r4, %r5}], [%r9];": "sm_100a sm_103a",
    "cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes "
    "[%r9], [%d0, {%r1, %r2, %r3, %r4, %r5}], [%r9];": "sm_100a sm_103a sm_120a",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.mbarrier::complete_tx::bytes "
    "[%r9], [%d0, {%r1, %r2, %r3, %r4, %r5}], [%r9];": "sm_100a sm_103a",
    "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 "
    "[%r9], [%r9];": "sm_100a sm_103a sm_120a",
    "setmaxnreg.dec.sync.aligned.u32 40;": "sm_90a sm_100a sm_103a sm_120a",
}


@pytest.mark.parametrize("line", ONLY)
@pytest.mark.parametrize("target", ["sm_90", "sm_90a", "sm_100a", "sm_103a", "sm_120a"])
def test_instructions_that_a_target_lacks(line, target):
    """As ptxas 13.0 accepts and refuses them."""
    if target in ONLY[line].split():
        program_of(line, 1, target)
    else:
        with pytest.raises(PtxError, match=f"{target} has no {line.split('.')[0]}"):
            program_of(line, 1, target)


def test_a_gpu_takes_its_own_code_only():
    x = np.zeros(4, np.uint32)
    run_ptx("", x, target="sm_100a", gpu="B200")
    with pytest.raises(PtxError, match="PTX for sm_100a does not run on H100, which takes sm_90a"):
        run_ptx("", x, target="sm_100a", gpu="H100")
    with pytest.raises(ValueError, match="known are H100, H200"):
        run_ptx("", x, gpu="V100")


def test_registers_of_warps_add_up():
    """Two warpgroups give and take; what was not given back is waited for, here for ever."""
    body = """
    shr.u32 %r1, %r0, 7; setp.eq.u32 %p0, %r1, 0;
    @%p0 bra GIVE; setmaxnreg.inc.sync.aligned.u32 MORE; bra DONE;
    GIVE: setmaxnreg.dec.sync.aligned.u32 40; DONE:
    """
    launch(".maxnreg 128", body.replace("MORE", "216"), block=(256, 1, 1))
    with pytest.raises(Fault, match=r"deadlock(.|\n)*setmaxnreg.inc to 224"):
        launch(".maxnreg 128", body.replace("MORE", "224"), block=(256, 1, 1))


@pytest.mark.parametrize("changed", [0, 1])
def test_all_warps_of_a_warpgroup_change_their_registers(changed):
    """9.7.19.5: by the same count, each as often as the others; here warp 2 or 6 does not."""
    body = """
    setp.lt.u32 %p1, %r0, 128; shr.u32 %r1, %r0, 5; setp.eq.u32 %p2, %r1, WARP;
    @!%p1 bra TAKE;
    GIVE bra END;
    TAKE: MORE END:
    """
    lines = ["setmaxnreg.dec.sync.aligned.u32 40;", "setmaxnreg.inc.sync.aligned.u32 176;"]

    def run(line):
        both = [*lines[:changed], line, *lines[changed + 1 :]]
        text = body.replace("GIVE", both[0]).replace("MORE", both[1])
        launch(".maxnreg 128", text.replace("WARP", str(2 + 4 * changed)), block=(256, 1, 1))

    run(lines[changed])
    run("bra.uni SAME; SAME: " + lines[changed])
    with pytest.raises(Fault, match=rf"by warp {4 * changed} but not by warp {2 + 4 * changed} of"):
        run(f"@%p2 bra END; {lines[changed]}")
    other = f"@!%p2 bra SAME; setmaxnreg.dec.sync.aligned.u32 48; bra END; SAME: {lines[changed]}"
    with pytest.raises(Fault, match="setmaxnreg to [0-9]+, but to [0-9]+ in warp"):
        run(other)
