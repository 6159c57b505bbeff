"""The command ``sonic``: ``compile`` fills the cache for a layer, and ``doctor`` reports."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from sonic import cli
from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime import objects
from sonic.runtime.backend import load_backend
from sonic.runtime.cache import kernel_cache
from sonic.runtime.errors import CompileError
from sonic.runtime.problem import Arch, TileConfig, layer_problems
from tests.layer_launches import copy_of_sources, kernels_of_stages
from tests.refusals import refusal

SIZE = cli.LayerSize(64, 128, 64, 4, 2)
needs_dsl = pytest.mark.skipif(
    shutil.which("cc") is None or objects.runtime_library() is None,
    reason="needs nvidia-cutlass-dsl and a C compiler",
)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty cache for this process and its children."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("SONIC_CACHE", raising=False)
    kernel_cache.cache_clear()
    yield tmp_path / "kernels"
    kernel_cache.cache_clear()


def of_size(problem, rows_per_expert, n, k, experts):
    """Stands for a choice of tiles, and shows what it was asked."""
    return TileConfig(rows_per_expert, n, k)


# ------------------------------------------------------------------------------ what is compiled


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU])
@pytest.mark.parametrize("add_bias", [False, True])
def test_compiled_problems_are_those_of_a_layer(activation, add_bias):
    kernels = cli.layer_kernels(of_size, SIZE, activation, "float16", add_bias)
    expected = [
        problem
        for accumulate in (False, True)
        for problem in layer_problems(activation, "float16", add_bias, accumulate)
    ]
    assert {problem for problem, _ in kernels} == set(expected)


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU])
@pytest.mark.parametrize("layout", list(GateUpLayout))
def test_compiled_kernels_are_those_that_the_stages_launch(activation, layout):
    pytest.importorskip("triton")
    asked = kernels_of_stages(of_size, SIZE, activation, layout, torch.bfloat16)
    kernels = cli.layer_kernels(of_size, SIZE, activation, "bfloat16", False)
    assert set(asked) == set(kernels) and len(kernels) == 9


def test_slices_of_columns_are_compiled_too():
    """Of a large layer, where dh has memory of its own."""
    size = cli.LayerSize(32768, 2048, 768, 128, 8)
    kernels = cli.layer_kernels(of_size, size, ActivationType.SWIGLU, "bfloat16", False)
    widths = {}
    for problem, config in kernels:
        widths.setdefault(problem.name, set()).add(config.tile_n)
    assert widths["rows_linear_bf16"] == {2048}
    assert widths["rows_linear_transposed_weight_gated_rows_bf16"] == {2048, 512}


@pytest.mark.parametrize(
    "text", ["1,2,3,4", "1,2,3,4,5,6", "a,2,3,4,1", "0,2,3,4,1", "1,2,3,4,5", ""]
)
def test_wrong_sizes_are_refused(text, capsys):
    assert "--thiek" in refusal(cli.main, ["compile", "--thiek", text], capsys)


@pytest.mark.parametrize("command", ["compile", "tune"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("64,12,8,2,1", "hidden_size=12.*Allowed: positive multiples of 8.*Pad it to 16\\.$"),
        ("64,8,12,2,1", "intermediate_size=12.*Allowed: positive multiples of 8.*Pad it to 16"),
        ("64,8,8,65537,1", "the number of experts=65537.*Allowed: 1 to 65536"),
        ("64,8,8,128,65", "top_k=65 is out of range. Allowed: 1 to 64"),
        ("1073741825,8,8,2,1", "1073741825 slots.*Allowed: at most 1073741824.*Split"),
        ("9999999999,8,8,2,1", "9999999999 slots.*Allowed: at most 1073741824.*Split"),
    ],
)
def test_sizes_that_the_kernels_refuse_are_not_compiled(command, text, says, monkeypatch, capsys):
    monkeypatch.setattr(cli, "compile_kernels", lambda *_: pytest.fail("compiled"))
    assert cli.main([command, "--thiek", text]) == 2
    error = capsys.readouterr().err
    assert re.search(f"sonic {command}: --thiek {text}: {says}", error)
    assert "impl=" not in error, "no option of the command"


def test_a_size_is_required(capsys):
    assert "--thiek" in refusal(cli.main, ["compile"], capsys)


@pytest.mark.parametrize("text", ["0", "x", "1.5", ""])
def test_jobs_are_positive(text, capsys):
    flags = ["compile", "--thiek", "1,8,8,2,1", "-j", text]
    assert f"expected a positive number, got {text!r}" in refusal(cli.main, flags, capsys)


# ------------------------------------------------------------------------------ refusals


def test_an_architecture_without_kernels_is_refused(directory, capsys):
    assert cli.main(["compile", "--arch", "sm100", "--thiek", "1,8,8,2,1"]) == 2
    text = capsys.readouterr().err
    assert "not in this release (ready: sm90); choose one that is" in text and "impl=" not in text


@needs_dsl
@pytest.mark.parametrize("mode", ["ro", "off"])
def test_a_cache_that_keeps_nothing_is_not_filled(directory, mode, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHE", mode)
    assert cli.main(["compile", "--thiek", "1,8,8,2,1"]) == 2
    assert f"SONIC_CACHE is {mode}" in capsys.readouterr().err
    assert not directory.exists()


@needs_dsl
def test_a_cache_that_others_can_write_is_not_filled(directory, capsys):
    directory.mkdir()
    directory.chmod(0o777)
    assert cli.main(["compile", "--thiek", "1,8,8,2,1"]) == 2
    assert "chmod go-w" in capsys.readouterr().err


@needs_dsl
def test_a_wrong_setting_is_reported(directory, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHE", "yes")
    assert cli.main(["compile", "--thiek", "1,8,8,2,1"]) == 2
    assert "SONIC_CACHE is 'yes'" in capsys.readouterr().err


class InOrder:
    """A pool that runs everything at once, in this process."""

    def __init__(self, jobs, **options):
        self.jobs = jobs

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_every_kernel_gets_a_line_and_failures_a_status(monkeypatch, capsys):
    kernels = cli.layer_kernels(of_size, SIZE, ActivationType.SWIGLU, "bfloat16", False)

    def compile_one(arch, problem, config):
        if problem is kernels[1][0]:
            raise CompileError("out of registers")
        return "compiled in 1.0 s"

    monkeypatch.setattr(cli, "ProcessPoolExecutor", InOrder)
    monkeypatch.setattr(cli, "_compile_one", compile_one)
    assert cli.compile_kernels(Arch.SM90, kernels, 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(kernels) + 1
    assert sum("failed: out of registers" in line for line in lines) == 1
    assert f"{len(kernels) - 1} of {len(kernels)} in the cache" in lines[-1]
    assert cli.compile_kernels(Arch.SM90, kernels[2:], 2) == 0


def test_every_number_of_tokens_is_compiled_unless_one_is_asked_for(directory, monkeypatch, capsys):
    backend = load_backend(Arch.SM90)
    filled = []
    monkeypatch.setattr(cli, "compile_kernels", lambda arch, kernels, jobs: filled.append(kernels))
    command = ["compile", "--thiek", "64,1024,512,64,2", "--thiek", "9,1024,512,64,2", "--add_bias"]
    cli.main(command)
    cli.main([*command, "--these_tokens"])
    every, one = filled
    how = ActivationType.SWIGLU, "bfloat16", True
    size = cli.LayerSize(64, 1024, 512, 64, 2)  # more than one wave, with many tokens
    expected, all_tokens = set(), {}
    for gpu in backend.gpus:
        chosen = backend.for_gpu(gpu)
        expected |= set(cli.layer_kernels(chosen.default_config, size, *how))
        expected |= set(cli.layer_kernels(chosen.default_config, replace(size, tokens=9), *how))
        configs = chosen.default_configs
        all_tokens[gpu] = set(cli.layer_kernels_of_any_tokens(configs, size, *how))
    assert set(one) == expected
    assert set(every) == set().union(*all_tokens.values())
    assert set(one) < set(every) and len(set(every)) == len(every)
    assert f"{len(every)} kernels for sm90" in capsys.readouterr().out
    for gpu in backend.gpus:
        filled.clear()
        cli.main([*command, "--gpu", gpu.lower()])
        assert set(filled[0]) == all_tokens[gpu] < set(every)


def test_a_gpu_without_tiles_of_its_own_is_refused(directory, capsys):
    assert cli.main(["compile", "--thiek", "64,1024,512,64,2", "--gpu", "A100"]) == 2
    said = capsys.readouterr().err
    assert "--gpu 'A100'" in said and "H100 and H200" in said and "leave it out" in said


# ------------------------------------------------------------------------------ end to end

_COLD_START = """
import sys, time
import torch
import sonic.cli, sonic.functional
from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime import launch
from sonic.runtime.backend import load_backend
from sonic.runtime.problem import Arch
from tests.layer_launches import copy_of_sources, kernels_of_stages

start = time.perf_counter()
backend = load_backend(Arch.SM90)
def compile(problem, config):
    raise AssertionError(f"compiled {problem.name} {config.name}, although the cache was filled")
backend.compile = compile
size = sonic.cli.LayerSize(64, 128, 64, 4, 2)
asked = kernels_of_stages(
    backend.default_config, size, ActivationType.RELU, GateUpLayout.INTERLEAVED, torch.float16
)
for problem, config in asked:
    launch.kernel_for(backend, problem, config)
print(len(asked), time.perf_counter() - start, "cutlass" in sys.modules)
"""


@needs_dsl
def test_compile_fills_the_cache_with_all_that_a_layer_needs(directory, tmp_path):
    """A second process then imports no CuTeDSL, and is ready in a fraction of a second."""
    environment = {**os.environ, "SONIC_CACHE_DIR": str(directory)}
    root = copy_of_sources(tmp_path)

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    thiek = ",".join(
        map(str, (SIZE.tokens, SIZE.hidden, SIZE.intermediate, SIZE.experts, SIZE.top_k))
    )
    fill = [
        "-m",
        "sonic",
        "compile",
        "--thiek",
        thiek,
        "--activation",
        "relu",
        "--dtype",
        "Float16",
    ]
    printed = run(*fill, "--these_tokens", "-j", "2")
    assert "9 of 9 in the cache" in printed and printed.count("compiled in") == 9
    printed = run(*fill, "--these_tokens", "-j", "1")
    assert "9 of 9 in the cache" in printed and printed.count("was there") == 9
    count, seconds, imported = run("-c", _COLD_START).split()
    assert (int(count), imported) == (9, "False")
    assert float(seconds) < 2
    report = run("-m", "sonic", "doctor")
    assert "of this installation: 9 kernels" in report


# ------------------------------------------------------------------------------ doctor


def test_doctor_says_what_is_here(directory, capsys):
    status = cli.main(["doctor"])
    printed = capsys.readouterr().out
    for piece in ("Python 3", f"torch {torch.__version__}", "reference", str(directory), "mode rw"):
        assert piece in printed
    if objects.runtime_library() is not None:
        assert status == 0 and "nothing to repair" in printed
        assert "of this installation: 0 kernels" in printed
    assert not directory.exists(), "a report changes nothing"


def test_doctor_finds_what_needs_repair(directory, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHEDIR", "/x")
    directory.mkdir()
    directory.chmod(0o777)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "SONIC_CACHEDIR is set" in printed.split("to repair")[1]
    if objects.runtime_library() is not None:
        assert "chmod go-w" in printed.split("to repair")[1]


def test_doctor_reports_a_missing_package(directory, monkeypatch, capsys):
    present = cli._version
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "triton" else present(name))
    assert cli.main(["doctor"]) == 1
    assert "pip install triton" in capsys.readouterr().out


def test_doctor_reports_a_wrong_setting(directory, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHE", "yes")
    assert cli.main(["doctor"]) == 1
    assert "SONIC_CACHE is 'yes'" in capsys.readouterr().out.split("to repair")[1]


@needs_dsl
def test_doctor_finds_damaged_entries(directory, capsys):
    folder = kernel_cache().folder(Arch.SM90, create=True)
    (folder / "broken.so").write_bytes(b"x" * 100)
    (folder / "broken.so").chmod(0o600)
    assert cli.main(["doctor"]) == 1
    repair = capsys.readouterr().out.split("to repair")[1]
    assert str(folder / "broken.so") in repair and "remove it" in repair


@needs_dsl
def test_doctor_finds_a_directory_that_cannot_be_made(tmp_path, directory, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kernel_cache.cache_clear()
    assert cli.main(["doctor"]) == 1
    assert "cannot be created" in capsys.readouterr().out.split("to repair")[1]


@needs_dsl
def test_doctor_finds_nothing_to_read(directory, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHE", "ro")
    kernel_cache.cache_clear()
    assert cli.main(["doctor"]) == 1
    assert f"{directory} does not exist" in capsys.readouterr().out.split("to repair")[1]
