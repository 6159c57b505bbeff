"""The first use of a layer: what is compiled side by side, by whom, and when not."""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from sonic import cli
from sonic.enums import ActivationType
from sonic.runtime import fill
from sonic.runtime.backend import load_backend
from sonic.runtime.cache import KernelCache, KernelKey
from sonic.runtime.problem import Arch, down_problem, up_problem
from sonic.runtime.settings import CacheMode, CompileMode, Settings
from tests.layer_launches import kernels_of_stages

BACKEND = load_backend(Arch.SM90)
HIDDEN, INTERMEDIATE, EXPERTS = 256, 128, 8
DEVICE = torch.device("cpu")


class Machine:
    """A cache in a folder, some CPUs, and the commands that were run."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._patch = folder, monkeypatch
        self.commands = []
        self.outcome = 0, ""
        self.keeps = True
        self.backend = BACKEND
        self.set_up()
        monkeypatch.setattr(fill, "backend_for", lambda device: self.backend)
        monkeypatch.setattr(fill, "_wait_for", self.run)

    def set_up(self, cache=CacheMode.READ_WRITE, mode=CompileMode.ALL, cpus=4):
        """A process that has not tried anything yet."""
        settings = Settings(cache, self.folder / "kernels", mode)
        self.cache = KernelCache(settings, toolchain=lambda arch: {"sources": "one"})
        self._patch.setattr(fill, "kernel_cache", lambda: self.cache)
        self._patch.setattr(fill, "usable_cpus", lambda: cpus)
        self._patch.setattr(fill, "_tried", set())

    def run(self, command, folder, environment):
        self.commands.append((command, folder, environment))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.keeps and self.outcome[0] == 0:
            self.write_kernels()
        return self.outcome

    def write_kernels(self):
        for path in self.paths():
            path.write_text("a kernel")

    def paths(self):
        folder = self.cache.folder(Arch.SM90, create=True)
        return [folder / f"{key.stem}.so" for key in self.keys]

    def mark_as_failed(self):
        """What a process that could not compile the last layer that was used leaves."""
        folder = self.cache.folder(Arch.SM90, create=True)
        path = fill._mark_of_failure(folder, self.backend.gpu, self.keys[0], self.sizes)
        path.touch()
        return path

    def use(
        self,
        activation=ActivationType.SWIGLU,
        dtype="bfloat16",
        bias=False,
        training=True,
        experts=EXPERTS,
    ):
        up = up_problem(activation, dtype, bias, training)
        width = INTERMEDIATE * (2 if activation.is_gated else 1)
        configs = self.backend.default_configs(up, width, HIDDEN, experts)
        self.keys = [KernelKey(Arch.SM90, up, config) for config in configs]
        self.sizes = HIDDEN, width, experts
        fill.fill_cache(up, DEVICE, hidden=HIDDEN, width=width, experts=experts)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gpu", BACKEND.gpus)
@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU_SQ])
def test_the_command_compiles_what_the_layer_launches(machine, activation, gpu, bias):
    machine.backend = backend = BACKEND.for_gpu(gpu)
    machine.use(activation, "float16", bias)
    ((command, folder, environment),) = machine.commands
    assert folder.is_dir() and environment["SONIC_COMPILE"] == "needed"
    assert command[:3] == [sys.executable, "-m", "sonic"]
    parsed = cli._parser().parse_args(command[3:])
    (size,) = parsed.thiek
    told = ActivationType(parsed.activation), parsed.dtype, parsed.add_bias
    assert told == (activation, "float16", bias) and parsed.arch == "sm90"
    assert not parsed.these_tokens and parsed.gpu == [gpu]
    compiled = cli.layer_kernels_of_any_tokens(backend.default_configs, size, *told)
    layer = cli.LayerSize(4096, HIDDEN, INTERMEDIATE, EXPERTS, 2)
    if bias:
        launched = cli.layer_kernels(backend.default_config, layer, *told)
    else:
        how_run = activation, "interleaved", torch.float16
        launched = kernels_of_stages(backend.default_config, layer, *how_run)
    assert launched and set(launched) <= set(compiled)
    assert parsed.jobs == 4


def test_inference_compiles_a_part_and_training_the_rest(machine):
    machine.use(training=False)
    machine.use(training=True)
    (first, *_), (second, *_) = machine.commands
    assert "--inference" in first and "--inference" not in second
    parsed = cli._parser().parse_args(first[3:])
    compiled = []
    machine._patch.setattr(cli, "folder_to_fill", lambda arch: machine.folder)
    machine._patch.setattr(
        cli, "compile_kernels", lambda arch, kernels, jobs: compiled.extend(kernels)
    )
    cli._compile(parsed)
    every = cli.layer_kernels_of_any_tokens(
        BACKEND.default_configs, parsed.thiek[0], ActivationType.SWIGLU, "bfloat16", False
    )
    up = up_problem(ActivationType.SWIGLU, "bfloat16", False, store_preact=False)
    forward = {up, down_problem("bfloat16", False)}
    assert set(compiled) == {kernel for kernel in every if kernel[0] in forward}


def test_nothing_runs_where_the_kernel_is_there_or_none_would_be_kept(machine):
    machine.use()
    machine.set_up()
    machine.use()
    assert len(machine.commands) == 1
    machine.paths()[-1].unlink()
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


def test_a_process_looks_once_for_a_layer(machine, monkeypatch):
    machine.use()
    machine.set_up()
    machine.use()
    monkeypatch.setattr(machine.cache, "holds", lambda key: pytest.fail("looked for again"))
    machine.use()
    assert len(machine.commands) == 1


@pytest.mark.parametrize("fresh", [False, True])
def test_each_kind_of_gpu_has_its_own_kernels(machine, fresh):
    """In one process, and in a later one that finds the cache of the other kind."""
    for gpu in BACKEND.gpus:
        if fresh:
            machine.set_up()
        machine.backend = BACKEND.for_gpu(gpu)
        for _ in range(2):
            machine.use(experts=512)  # enough for tiles in waves, whose order depends on the card
    assert [c[c.index("--gpu") + 1] for c, *_ in machine.commands] == list(BACKEND.gpus)


def test_no_more_jobs_than_fit_into_memory(machine):
    machine.set_up(cpus=192)
    machine.use()
    ((command, *_),) = machine.commands
    assert command[command.index("--jobs") + 1] == "8"


@pytest.mark.parametrize("executable", [None, ""])
def test_a_program_without_an_interpreter_compiles_by_itself(machine, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    machine.use()
    assert not machine.commands


def test_a_frozen_program_is_not_started_again(machine, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    machine.use()
    assert not machine.commands


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (OSError("no processes left"), "no processes left"),
        (fill.subprocess.TimeoutExpired(["sonic"], 1800), "timed out"),
        ((1, "[1/2] up: failed: no registers\n1 of 2 in the cache\n"), "failed: no registers"),
        ((2, "sonic compile: no disk\n"), "no disk"),
        ((0, "all there"), "left some"),
    ],
)
def test_a_failure_is_logged_and_not_repeated(machine, caplog, outcome, said):
    machine.outcome, machine.keeps = outcome, False
    for _ in range(3):
        machine.use()
    assert said in caplog.text
    assert len(machine.commands) == 1
    machine.use(bias=True)
    assert len(machine.commands) == 2, "another layer"


def test_of_several_processes_one_compiles(machine, monkeypatch):
    """The second one waits for its turn, and finds the kernels, or does not try what failed."""
    for keeps in (True, False):
        machine.set_up()
        machine.commands.clear()

        @contextlib.contextmanager
        def late(path, keeps=keeps):
            assert path.parent == machine.cache.folder(Arch.SM90)
            for kernel in machine.paths():
                kernel.unlink(missing_ok=True)
            if keeps:
                machine.write_kernels()
            else:
                machine.mark_as_failed()
            yield

        monkeypatch.setattr(fill, "turn", late)
        machine.use()
        assert not machine.commands


def test_a_turn_of_another_layer_is_no_failure_of_this_one(machine, monkeypatch):
    """However long it took; nor is a failure of this layer's, long ago."""
    machine.use()
    other = machine.mark_as_failed()

    @contextlib.contextmanager
    def late(path):
        other.touch()
        yield

    monkeypatch.setattr(fill, "turn", late)
    machine.use(bias=True)
    assert len(machine.commands) == 2
    failed = machine.mark_as_failed()
    os.utime(failed, (0, 0))
    machine.set_up()
    for kernel in machine.paths():
        kernel.unlink()
    machine.use(bias=True)
    assert len(machine.commands) == 3 and not failed.exists()


def test_odd_search_paths_are_no_failure(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [tmp_path, "", "relative", *sys.path])
    machine.use()
    ((*_, environment),) = machine.commands
    search = environment["PYTHONPATH"].split(os.pathsep)
    assert all(os.path.isabs(path) for path in search)
    assert search[:2] == [os.getcwd(), os.path.abspath("relative")]


def test_what_ends_the_wait_ends_the_processes(tmp_path, monkeypatch):
    """Those too that the command started."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(fill, "_MOST_SECONDS", 3.0)
    with pytest.raises(fill.subprocess.TimeoutExpired):
        fill._wait_for([sys.executable, "-c", code], tmp_path, dict(os.environ))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_quota_counts(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(fill, "_QUOTA", quota)
    everything = fill.usable_cpus()
    for text, expected in (("max 100000", everything), ("50000 100000", 1), ("100000 100000", 1)):
        quota.write_text(text)
        assert fill.usable_cpus() == expected


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
    assert "it took" in caplog.text and "exit status" not in caplog.text, caplog.text


def test_a_problem_that_is_no_up_projection(machine):
    from sonic.runtime.problem import down_problem

    down = down_problem("bfloat16", False)
    with pytest.raises(ValueError, match="no up-projection"):
        fill.fill_cache(down, DEVICE, hidden=8, width=8, experts=1)
