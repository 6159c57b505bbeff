"""The first use of a layer: what is compiled side by side, by whom, and when not."""

import logging
import sys

import pytest
import torch

from sonic import cli
from sonic.enums import ActivationType
from sonic.runtime import fill
from sonic.runtime.backend import load_backend
from sonic.runtime.cache import KernelCache, KernelKey
from sonic.runtime.problem import Arch, up_problem
from sonic.runtime.settings import CacheMode, CompileMode, Settings
from tests.layer_launches import kernels_of_stages

BACKEND = load_backend(Arch.SM90)
HIDDEN, INTERMEDIATE, EXPERTS = 256, 128, 8
DEVICE = torch.device("cpu")


class Machine:
    """A cache in a folder, some CPUs, and the commands that were run."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._patch = folder, monkeypatch
        self.commands, self.fails, self.compiles = [], None, True
        self.set_up()
        monkeypatch.setattr(fill, "backend_for", lambda device: BACKEND)
        monkeypatch.setattr(fill.subprocess, "run", self.run)

    def set_up(self, cache=CacheMode.READ_WRITE, mode=CompileMode.ALL, cpus=4):
        settings = Settings(cache, self.folder / "kernels", mode)
        self.cache = KernelCache(settings, toolchain=lambda arch: {"sources": "one"})
        self._patch.setattr(fill, "kernel_cache", lambda: self.cache)
        self._patch.setattr(fill, "usable_cpus", lambda: cpus)

    def run(self, command, **how):
        self.commands.append((command, how))
        if self.fails is not None:
            raise self.fails

    def use(self, activation=ActivationType.SWIGLU, dtype="bfloat16", bias=False, training=True):
        up = up_problem(activation, dtype, bias, training)
        width = INTERMEDIATE * (2 if activation.is_gated else 1)
        config = BACKEND.default_config(up, 64, width, HIDDEN, EXPERTS)
        fill.fill_cache(up, config, DEVICE, hidden=HIDDEN, width=width, experts=EXPERTS)
        return KernelKey(Arch.SM90, up, config)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU_SQ])
def test_the_command_compiles_what_the_layer_launches(machine, activation, bias):
    machine.use(activation, "float16", bias)
    ((command, how),) = machine.commands
    assert command[:3] == [sys.executable, "-m", "sonic"]
    parsed = cli._parser().parse_args(command[3:])
    (size,) = parsed.thiek
    told = ActivationType(parsed.activation), parsed.dtype, parsed.add_bias
    assert told == (activation, "float16", bias) and parsed.arch == "sm90"
    assert not parsed.these_tokens
    compiled = cli.layer_kernels_of_any_tokens(BACKEND.default_configs, size, *told)
    layer = cli.LayerSize(4096, HIDDEN, INTERMEDIATE, EXPERTS, 2)
    if bias:
        launched = cli.layer_kernels(BACKEND.default_config, layer, *told)
    else:
        how_run = activation, "interleaved", torch.float16
        launched = kernels_of_stages(BACKEND.default_config, layer, *how_run)
    assert launched and set(launched) <= set(compiled)
    assert how["check"] and how["cwd"].is_dir()


def test_nothing_runs_where_the_kernel_is_there_or_none_would_be_kept(machine):
    key = machine.use()
    path = machine.cache.folder(Arch.SM90, create=True) / f"{key.stem}.so"
    path.write_text("a kernel")
    machine.use()
    assert len(machine.commands) == 1
    path.unlink()
    for settings in (
        {"mode": CompileMode.NEEDED},
        {"cache": CacheMode.READ_ONLY},
        {"cache": CacheMode.OFF},
        {"cpus": 1},
    ):
        machine.set_up(**settings)
        machine.use()
    assert len(machine.commands) == 1
    machine.set_up()
    machine.use()
    assert len(machine.commands) == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError("no processes left"),
        fill.subprocess.CalledProcessError(2, ["sonic"], stderr=b"loading\nno compiler\n"),
    ],
)
def test_a_failure_leaves_the_kernels_to_the_calls(machine, caplog, error):
    machine.fails = error
    machine.use()
    assert "one after another" in caplog.text
    assert "no processes left" in caplog.text or "no compiler" in caplog.text


def test_the_child_imports_this_sonic_and_nothing_of_the_current_directory(
    tmp_path, monkeypatch, caplog
):
    elsewhere = tmp_path / "project"
    elsewhere.mkdir()
    for name in ("sonic", "torch", "argparse"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(elsewhere)
    code = f"import sys, sonic.cli; sys.exit(sonic.cli.__file__ != {cli.__file__!r})"
    with caplog.at_level(logging.INFO, logger="sonic"):
        fill._run([sys.executable, "-c", code], tmp_path)
    assert "compiled them in" in caplog.text, caplog.text


def test_a_problem_that_is_no_up_projection(machine):
    from sonic.runtime.problem import down_problem

    down = down_problem("bfloat16", False)
    config = BACKEND.default_config(down, 64, HIDDEN, INTERMEDIATE, EXPERTS)
    with pytest.raises(ValueError, match="no up-projection"):
        fill.fill_cache(down, config, DEVICE, hidden=8, width=8, experts=1)
