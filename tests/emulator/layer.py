"""Runs the layer's GPU stages (`sonic.stages`) on CPU tensors: its launches go to the emulator."""

import contextlib
import functools
from collections.abc import Iterator

from .compiled import needed_options
from .policy import Policy
from .run import Emulator


@functools.cache
def emulator_for(problem, config):
    """The emulator of one kernel of `kernels_sm90`, compiled once a process."""
    from kernels_sm90.compile import compile_kernel

    with needed_options() as options:
        return Emulator(compile_kernel(problem, config, options))


class Session:
    """What the launches of an `emulated_layer` block share; `machines`, oldest first, they left.

    `config` replaces the tile choice, if it is not None.
    """

    def __init__(self, seed, mode, sms, config, options):
        self.seed, self.mode, self.sms, self.config, self.options = seed, mode, sms, config, options
        self.machines = []

    def kernel_for(self, backend, problem, config):
        def call(*args):
            policy = Policy(self.seed + len(self.machines), self.mode)
            machine = emulator_for(problem, config)(args, policy, self.sms, **self.options)
            self.machines.append(machine)

        return call

    def config_for(self, problem, device, rows, experts, n, k):
        if self.config is not None:
            return self.config
        from kernels_sm90.tiles import default_config

        return default_config(problem, rows // max(experts, 1), n, k)


@contextlib.contextmanager
def emulated_layer(seed=0, mode="mixed", sms=4, config=None, **options) -> Iterator[Session]:
    """Inside the block, grouped GEMMs of `sonic.stages` run in the emulator on CPU tensors.

    seed, mode: see Policy; each launch has its own seed. sms: the number of SMs, few so that CTAs
        take several tiles.
    config: a TileConfig for every launch instead of the default one. options: see Machine.
    """
    from sonic import stages
    from sonic.runtime import launch

    session = Session(seed, mode, sms, config, options)
    replaced = [
        (launch, "kernel_for", session.kernel_for),
        (launch, "backend_for", lambda device: None),
        (launch, "_multiprocessors", lambda device: sms),
        (launch, "config_for", session.config_for),
        (stages, "config_for", session.config_for),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield session
    finally:
        for module, name, value in before:
            setattr(module, name, value)
