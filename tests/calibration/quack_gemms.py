"""Compiles configurations with the GEMMs of quack-kernels; needs that package, and no GPU.

Runs as a process of its own, one an architecture, because quack and the DSL read it from the
environment once: python -m tests.calibration.quack_gemms ARCH FOLDER NAME...
"""

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("quack-kernels", "nvidia-cutlass-dsl", "torch", "apache-tvm-ffi")


class Recorder:
    """Stands in for a compiled function: keeps the arguments of the call that would launch it."""

    last = None

    def __init__(self, compiled):
        self.compiled = compiled

    def __call__(self, *args):
        Recorder.last = (self.compiled, args)


def install(arch, options, clusters):
    """Makes quack's compile step compile for `arch` and record; `clusters()` of them are active."""
    import cutlass.cute as cute
    import quack.cache

    quack.cache.CACHE_ENABLED = False
    real = cute.compile

    def compile_and_record(*args, **kwargs):
        kwargs["options"] = f"--gpu-arch {arch} {options}"
        return Recorder(real(*args, **kwargs))

    cute.compile = compile_and_record
    import quack.gemm
    import quack.gemm_runtime.host

    for module in (quack.gemm, quack.gemm_runtime.host):
        module.get_max_active_clusters = lambda *args, **kwargs: clusters()


def call_quack(c, t):
    """Calls quack's entry point for a configuration on its tensors."""
    from .problems import is_gated, is_gated_derivative

    lengths = {}
    if c.kind != "dense":
        lengths = {"cu_seqlens_m" if c.kind == "varlen_m" else "cu_seqlens_k": t["cu_seqlens"]}
    common = {
        "tile_M": c.tile[0], "tile_N": c.tile[1], "tile_K": c.tile[2] if len(c.tile) > 2 else None,
        "cluster_M": c.cluster[0], "cluster_N": c.cluster[1], "pingpong": c.pingpong,
        "persistent": c.persistent, "is_dynamic_persistent": c.dynamic, "A_idx": t.get("index"),
        "use_tma_gather": c.tma_gather, "tile_count_semaphore": t.get("semaphore"),
        "split_k": c.split, **lengths,
    }  # fmt: skip
    if c.epilogue == "linear":
        import quack.gemm

        quack.gemm._split_k_buffers = lambda *args: (t["flags"], t["partials"])
        quack.gemm.gemm(
            t["A"], t["B"], t["D"], t.get("C"), alpha=c.alpha, beta=c.beta if c.beta else 1.0,
            rowvec_bias=t.get("row"), colvec_bias=t.get("col"), add_to_output=c.add,
            SFA=t.get("scale_A"), SFB=t.get("scale_B"), bs_format_a=c.blocks or None,
            bs_format_b=c.blocks or None, **common,
        )  # fmt: skip
        return
    from quack.epilogue.library import dgated_mod, linear_act_mod

    if is_gated_derivative(c):
        mod = dgated_mod(c.epilogue[1:], has_scale=False, has_reduce=False)
    else:
        mod = linear_act_mod(
            c.epilogue, gated=is_gated(c), has_c=bool(c.beta), has_rowvec=c.row, has_colvec=c.col
        )
    values = {
        "mAuxOut": t["act"],
        "mRowVecBroadcast": t.get("row"),
        "mColVecBroadcast": t.get("col"),
    }
    values = {name: value for name, value in values.items() if value is not None}
    mod.gemm(t["A"], t["B"], t["D"], t.get("C"), epi_args=values, **common)


def describe(value, tensors):
    """A JSON description of an argument: named tensors, numbers, None, lists for tuples."""
    import torch
    from cutlass import Numeric

    if isinstance(value, tuple):
        return [describe(v, tensors) for v in value]
    if isinstance(value, Numeric):
        return value.value
    if isinstance(value, torch.Tensor):
        at = value.untyped_storage().data_ptr()
        for name, t in tensors.items():
            if t.untyped_storage().data_ptr() == at:
                if value.dtype != t.dtype:
                    raise ValueError(f"quack passes {name} as {value.dtype}")
                place = list(value.shape), list(value.stride()), value.storage_offset()
                return {"tensor": name, "place": place}
        raise ValueError(f"quack passes a tensor of its own, {value.dtype}{list(value.shape)}")
    if isinstance(value, int) and not isinstance(value, bool):
        for name, t in tensors.items():
            if value == t.data_ptr():
                return {"pointer": name}
    return value


def compile_one(c, folder):
    """Writes KEY.ptx, KEY.o and KEY.json."""
    from tests.emulator.compiled import export, ptx_of

    from .configurations import OBJECT_NAME
    from .problems import make_tensors

    began = time.perf_counter()
    tensors = make_tensors(c)
    call_quack(c, tensors)
    compiled, args = Recorder.last
    text = ptx_of(compiled)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        os.replace(export(compiled, scratch, OBJECT_NAME), folder / f"{c.key}.o")
    (folder / f"{c.key}.ptx").write_text(text)
    about = {
        "configuration": repr(c),
        "arguments": describe(args, tensors),
        "versions": {p: version(p) for p in PACKAGES},
        "compile_seconds": round(time.perf_counter() - began, 2),
    }
    (folder / f"{c.key}.json").write_text(json.dumps(about, indent=1) + "\n")  # last: it is whole


def main(arch, folder, names):
    os.environ["QUACK_ARCH"] = os.environ["CUTE_DSL_ARCH"] = arch
    from tests.emulator.compiled import needed_options

    from .configurations import CONFIGURATIONS

    current = []
    with needed_options() as options:
        install(arch, options, lambda: current[-1].clusters)
        failed = 0
        for name in names:
            current.append(CONFIGURATIONS[name])
            try:
                compile_one(current[-1], Path(folder))
            except Exception as e:  # the others shall compile
                failed += 1
                print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
