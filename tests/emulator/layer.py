"""Runs the layer's GPU stages (`sonic.stages`) on CPU tensors: its launches go to the emulator."""

import contextlib
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Iterator

from sonic.runtime.problem import Arch

from .compiled import needed_options
from .policy import Policy
from .run import Emulator


def has_kernels(arch):
    """Whether there is a kernel package for an architecture."""
    return importlib.util.find_spec(f"kernels_{arch.value}.compile") is not None


@functools.cache
def emulator_for(problem, config, arch):
    """The emulator of one kernel of a kernel package, compiled once a process."""
    module = importlib.import_module(f"kernels_{arch.value}.compile")
    with needed_options() as options:
        return Emulator(module.compile_kernel(problem, config, options))


class Session:
    """What the launches of an `emulated_layer` block share, and leave: `machines` and the tiles
    `configs` of each, oldest first.

    `config` replaces the tile choice, if it is not None.
    """

    def __init__(self, seed, mode, sms, config, arch, options):
        self.seed, self.mode, self.sms, self.config = seed, mode, sms, config
        self.arch, self.options = arch, options
        self.machines, self.configs = [], []

    def kernel_for(self, backend, problem, config):
        def call(*args):
            policy = Policy(self.seed + len(self.machines), self.mode)
            emulator = emulator_for(problem, config, self.arch)
            machine = emulator(args, policy, self.sms, **self.options)
            self.machines.append(machine)
            self.configs.append(config)

        return call

    def config_for(self, problem, device, rows, experts, n, k):
        if self.config is not None:
            return self.config
        backend = importlib.import_module(f"kernels_{self.arch.value}").BACKEND
        return backend.default_config(problem, rows // max(experts, 1), n, k, experts)


def _add_parts(out, partial, offset_by_expert, rows):
    """The torch twin of `sonic.triton.parts.add_parts`."""
    size = max(-(-rows // (partial.shape[0] + 1)), 1)
    for expert, (begin, end) in enumerate(itertools.pairwise(offset_by_expert.tolist())):
        later = [partial[row // size - 1].float() for row in range(begin + size, end, size)]
        out[expert] = sum(later, out[expert].float()).to(out.dtype)


@contextlib.contextmanager
def emulated_layer(
    seed=0, mode="mixed", sms=4, config=None, arch=Arch.SM90, **options
) -> Iterator[Session]:
    """Inside the block, grouped GEMMs of `sonic.stages` run in the emulator on CPU tensors.

    seed, mode: see Policy; each launch has its own seed. sms: the number of SMs, few so that CTAs
        take several tiles.
    config: a TileConfig for every launch instead of the default one.
    arch: whose kernels, see :func:`has_kernels`. options: see Machine.
    """
    import sonic.triton.parts as parts_module
    from sonic import stages
    from sonic.runtime import launch

    session = Session(seed, mode, sms, config, arch, options)
    replaced = [
        (launch, "kernel_for", session.kernel_for),
        (launch, "backend_for", lambda device: None),
        (launch, "_multiprocessors", lambda device: sms),
        (launch, "config_for", session.config_for),
        (parts_module, "add_parts", _add_parts),
        (stages, "config_for", session.config_for),
        (stages, "compile_ahead", lambda *_: None),
        (stages, "fill_cache", lambda *_, **__: None),
        (stages, "prepared", launch.prepared.__wrapped__),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield session
    finally:
        for module, name, value in before:
            setattr(module, name, value)
