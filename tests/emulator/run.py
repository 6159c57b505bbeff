"""Entry points: run a CuTeDSL function, or an already compiled one, on CPU tensors."""

import ctypes
import tempfile
from dataclasses import dataclass

from . import ptx
from .compiled import compile_function, export, fake_argument, ptx_of
from .host import HostFunction, buffers_of, is_array
from .machine import Machine
from .memory import GlobalMemory
from .policy import Policy
from .program import Program


class Emulator:
    """A compiled CuTeDSL host function with its kernels, ready to run on the CPU.

    compiled: what `cute.compile` returned, with --enable-tvm-ffi and --keep-ptx; or None, with
        `ptx_text`, `object_file` and `name` (that of `export_to_c(path, function_name=name)`).
    """

    def __init__(self, compiled=None, *, ptx_text=None, object_file=None, name="kernel"):
        if compiled is None and (ptx_text is None or object_file is None):
            raise ValueError("Emulator needs a compiled object, or ptx_text and object_file")
        with tempfile.TemporaryDirectory(prefix="emulator_") as folder:
            if compiled is not None:
                ptx_text, object_file = ptx_of(compiled), export(compiled, folder, name)
            self.host = HostFunction(object_file, name, folder)
        self.load(ptx_text)

    def load(self, ptx_text):
        """Translates PTX text; called again with a changed text for a mutation test.

        PtxError if it has no kernel, or one that the emulator cannot run.
        """
        programs = {n: Program(k) for n, k in ptx.parse(ptx_text).items()}
        if not programs:
            raise ptx.PtxError("the PTX text has no kernel (.entry)")
        self.ptx_text, self.programs = ptx_text, programs

    def __call__(self, args, policy=None, sm_count=None, **machine_options):
        """Runs the function on `args`, its signature's without the Constexprs; returns the Machine.

        Arrays are torch CPU tensors or numpy arrays and are used in place; other arguments are
        numbers, None, STREAM, a host.Pointer to an array, or tuples of all these. `sm_count` is
        what the host code reads as the number of SMs. Raises Fault for what the emulator finds.
        """
        machine = self.machine = Machine(GlobalMemory(), policy or Policy(), **machine_options)
        self.enqueue(args, machine, sm_count)
        machine.synchronize()
        return machine

    def enqueue(self, args, machine, sm_count=None):
        """Calls the function, whose launches join those that the machine has not run yet.

        The caller keeps `args` until they have run. Memory that a launch before named keeps that
        name.
        """
        memory, packed, regions = machine.memory, [], {}
        for i, a in enumerate(args):
            found = []
            packed.append(buffers_of(a, found))
            for b in found:
                if len(b.data):
                    regions.setdefault(b.base, (b.data, f"argument {i} {b.dtype}{list(b.shape)}"))
        for base, (data, label) in regions.items():
            if base not in memory.bases:
                memory.add(base, data, label)
        target = next(iter(self.programs.values())).kernel.target
        gpu = machine.gpu_for(target)

        def on_launch(launch):
            program = self.programs.get(launch.name)
            if program is None:
                known = ", ".join(self.programs)
                raise ptx.PtxError(
                    f"the host code launches {launch.name}, the PTX text has {known}: "
                    "load PTX of the same function"
                )
            params = [
                ctypes.string_at(launch.args[i], p[1]) for i, p in enumerate(program.kernel.params)
            ]
            machine.enqueue(
                program,
                launch.grid,
                launch.block,
                launch.cluster,
                launch.smem,
                params,
                launch.programmatic,
                launch.non_portable,
            )

        self.host(packed, on_launch, gpu.smem_block, sm_count or gpu.sms)


@dataclass(frozen=True)
class Const:
    """A compile-time (Constexpr) argument of `run_kernel`, absent from the call."""

    value: object


def run_kernel(
    function,
    args,
    gpu_arch="sm_90a",
    *,
    seed=0,
    policy=None,
    fakes=None,
    static=False,
    options="",
    sm_count=None,
    emulator=None,
    **machine_options,
):
    """Compiles a @cute.jit function and runs it; returns (its array arguments, the Machine).

    function: a @cute.jit host function (or an object with such a __call__) that launches kernels.
    args: in the order of its signature: torch CPU tensors or numpy arrays (used in place), numbers,
        None, STREAM for a stream, Const(value) for a Constexpr.
    seed, policy: a Policy, or a timing mode ("mixed", "eager", "random", "lazy") drawn with `seed`.
    fakes: the arguments for cute.compile; by default made from `args`, sizes and strides symbolic
        (`static`: fixed).
    emulator: an Emulator made before, to skip compiling.
    sm_count and other options: see Emulator.__call__ and Machine.
    """
    if emulator is None:
        if fakes is None:
            fakes = [a.value if isinstance(a, Const) else fake_argument(a, static) for a in args]
        emulator = Emulator(compile_function(function, fakes, gpu_arch, options))
    if not isinstance(policy, Policy):
        policy = Policy(seed, policy or "mixed")
    args = [a for a in args if not isinstance(a, Const)]
    machine = emulator(args, policy, sm_count, **machine_options)
    return [a for a in args if is_array(a)], machine
