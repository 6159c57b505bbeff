"""The cache of compiled kernels: keys, modes, damage, races and permissions with a fake compiler,
and real kernels that another process loads without importing CuTeDSL.
"""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sonic.enums import ActivationType
from sonic.runtime import cache as cache_module
from sonic.runtime import objects
from sonic.runtime.cache import KernelCache, KernelKey, describe_toolchain
from sonic.runtime.errors import ArgumentError
from sonic.runtime.problem import (
    Arch,
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
    down_problem,
)
from sonic.runtime.settings import CacheMode, CompileMode, Settings, unknown_variables
from tests.layer_launches import copy_of_sources

KEY = KernelKey(Arch.SM90, down_problem("bfloat16", False), TileConfig(128, 128))
TOOLCHAIN = {"sources": "first"}
OTHER_USER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
needs_dsl = pytest.mark.skipif(
    shutil.which("cc") is None or objects.runtime_library() is None,
    reason="needs nvidia-cutlass-dsl and a C compiler",
)


def write(compiled, folder, symbol):
    """The fake compiler's object file: its symbol and what was compiled."""
    path = folder / "kernel.so"
    path.write_bytes(f"{symbol}\n{compiled}\n".encode() + bytes(1000))
    return path


def load(path, symbol):
    found, compiled, _ = path.read_bytes().split(b"\n", 2)
    if found.decode() != symbol:
        raise RuntimeError(f"no {symbol} in {path}")
    return f"loaded {compiled.decode()}"


def make(directory, mode=CacheMode.READ_WRITE, toolchain=TOOLCHAIN, **changes):
    arguments = {"write": write, "load": load, "toolchain": lambda arch: dict(toolchain)} | changes
    return KernelCache(Settings(mode, directory), **arguments)


def never():
    raise AssertionError("compiled, although the cache has it")


def entries(directory):
    return sorted(path for path in directory.rglob("*.so"))


@pytest.fixture
def directory(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "kernels"


@pytest.fixture
def filled(directory):
    """A cache with one entry, and the entry."""
    make(directory).load_or_compile(KEY, lambda: "first")
    (entry,) = entries(directory)
    return directory, entry


# ------------------------------------------------------------------------------ hits and keys


def test_a_second_process_loads_what_the_first_compiled(directory):
    assert make(directory).load(KEY) is None
    assert make(directory).load_or_compile(KEY, lambda: "first") == "loaded first"
    assert make(directory).load_or_compile(KEY, never) == "loaded first"
    assert make(directory).load(KEY) == "loaded first"


def test_nothing_but_entries_and_locks_is_left(filled):
    directory, entry = filled
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix != ".lock"] == [entry]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (directory, entry.parent, entry))


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 64
    if isinstance(value, (Ragged, EpilogueKind, Schedule, Operand, ActivationType)):
        return next(other for other in type(value) if other is not value)
    return {"bfloat16": "float16", None: Operand.A}[value]


def test_every_field_is_part_of_the_key():
    stems = {KEY.stem}
    activated = dataclasses.replace(KEY.problem, activation=ActivationType.SWIGLU)
    for base in (KEY, dataclasses.replace(KEY, problem=activated)):
        for part in ("problem", "config"):
            for field in dataclasses.fields(getattr(base, part)):
                value = changed(getattr(getattr(base, part), field.name))
                if field.name == "activation" and value is Operand.A:
                    value = ActivationType.RELU
                other = dataclasses.replace(getattr(base, part), **{field.name: value})
                key = dataclasses.replace(base, **{part: other})
                assert key.stem != base.stem, f"{part}.{field.name}"
                stems.add(key.stem)
    assert len(stems) > len(dataclasses.fields(Problem)) + len(dataclasses.fields(TileConfig))


def test_names_are_fit_for_files_and_symbols():
    longest = Problem(
        Ragged.REDUCTION, "bfloat16", EpilogueKind.ACTIVATION_GRAD, Operand.A, True, True,
        ActivationType.SWIGLU_OAI, True, True,
    )  # fmt: skip
    key = KernelKey(Arch.SM120, longest, TileConfig(256, 256, 2, 2))
    assert len(f".{key.stem}.lock") < 200
    assert key.symbol.isidentifier()


def test_architectures_and_toolchains_do_not_share_entries(filled):
    directory, _ = filled
    assert make(directory).load(dataclasses.replace(KEY, arch=Arch.SM100)) is None
    other = make(directory, toolchain={"sources": "second"})
    assert other.load_or_compile(KEY, lambda: "second") == "loaded second"
    assert make(directory).load(KEY) == "loaded first"
    report = other.report(Arch.SM90)
    assert (report.current, report.other, report.damaged) == (1, 1, ())
    assert report.current_bytes > 1000 and report.other_bytes > 1000


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nvidia-cutlass-dsl", lambda m: m.setattr("importlib.metadata.version", lambda n: "9")),
        ("apache-tvm-ffi", lambda m: m.setattr("importlib.metadata.version", lambda n: "9")),
        ("toolkit", lambda m: m.setattr(objects, "toolkit", lambda: "cu99")),
        ("machine", lambda m: m.setattr("platform.machine", lambda: "abacus")),
        ("settings", lambda m: m.setenv("CUTE_DSL_LINEINFO", "1")),
    ],
)
def test_the_toolchain_has(name, change, monkeypatch):
    pytest.importorskip("nvidia_cutlass_dsl")
    before = describe_toolchain(Arch.SM90)
    change(monkeypatch)
    assert describe_toolchain(Arch.SM90)[name] != before[name]


def test_the_toolchain_lacks_what_changes_no_kernel(monkeypatch):
    pytest.importorskip("nvidia_cutlass_dsl")
    before = describe_toolchain(Arch.SM90)
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    monkeypatch.setenv("CUTE_DSL_DUMP_DIR", "/nowhere")
    assert describe_toolchain(Arch.SM90) == before
    assert before["python"] == sys.implementation.cache_tag


def test_an_unknown_version_turns_the_cache_off(directory, monkeypatch, caplog):
    def missing(name):
        raise cache_module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache_module.metadata, "version", missing)
    cache = KernelCache(Settings(CacheMode.READ_WRITE, directory), write, load)
    assert cache.load_or_compile(KEY, lambda: "first") == "first"
    assert "version of nvidia-cutlass-dsl is unknown" in caplog.text
    assert not directory.exists()


@pytest.mark.parametrize(
    ("changed_file", "matters"),
    [
        ("sonic/device/blocks.py", True),
        ("sonic/runtime/problem.py", True),
        ("sonic/runtime/objects.py", True),
        ("sonic/enums.py", True),
        ("kernels_sm90/mainloop.py", True),
        ("kernels_sm90/new_file.py", True),
        ("kernels_sm90/README.md", False),
        ("kernels_sm100/__init__.py", False),
        ("sonic/functional.py", False),
    ],
)
def test_a_changed_byte_of_a_source_changes_the_toolchain(tmp_path, changed_file, matters):
    pytest.importorskip("nvidia_cutlass_dsl")
    program = (
        "from sonic.runtime.cache import describe_toolchain\n"
        "from sonic.runtime.problem import Arch\n"
        "print(describe_toolchain(Arch.SM90)['sources'])"
    )
    copy_of_sources(tmp_path)

    def digest():
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    before = digest()
    path = tmp_path / changed_file
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"#")
    assert len(before) > 60
    assert (digest() != before) is matters


# ------------------------------------------------------------------------------ modes and settings


def test_read_only_loads_and_never_writes(filled, tmp_path):
    directory, _ = filled
    assert make(directory, CacheMode.READ_ONLY).load_or_compile(KEY, never) == "loaded first"
    before = sorted(directory.rglob("*"))
    other = dataclasses.replace(KEY, config=TileConfig(128, 192))
    assert make(directory, CacheMode.READ_ONLY).load_or_compile(other, lambda: "new") == "new"
    assert sorted(directory.rglob("*")) == before
    absent = tmp_path / "absent"
    assert make(absent, CacheMode.READ_ONLY).load_or_compile(KEY, lambda: "new") == "new"
    assert not absent.exists()


def test_off_neither_reads_nor_writes(filled, tmp_path):
    directory, _ = filled
    assert make(directory, CacheMode.OFF).load_or_compile(KEY, lambda: "new") == "new"
    absent = tmp_path / "absent"
    assert make(absent, CacheMode.OFF).load_or_compile(KEY, lambda: "new") == "new"
    assert not absent.exists()


def test_settings_of_the_environment():
    home = {"HOME": "/home/me"}
    assert Settings.from_environment(home).cache is CacheMode.READ_WRITE
    for mode in CacheMode:
        assert Settings.from_environment({"SONIC_CACHE": mode.value}).cache is mode
    assert Settings.from_environment(home).compile is CompileMode.ALL
    needed = Settings.from_environment({"SONIC_COMPILE": "needed"})
    assert needed.compile is CompileMode.NEEDED
    chosen = Settings.from_environment({"SONIC_CACHE_DIR": "/data/kernels"})
    assert chosen.cache_dir == Path("/data/kernels")


def test_default_directory_follows_xdg(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    directory = Settings.from_environment({"XDG_CACHE_HOME": "/var/xdg"}).cache_dir
    assert directory == Path("/var/xdg/sonic")
    for ignored in ("", "relative"):
        directory = Settings.from_environment({"XDG_CACHE_HOME": ignored}).cache_dir
        assert directory == Path("/home/me/.cache/sonic")
    tilde = Settings.from_environment({"SONIC_CACHE_DIR": "~/kernels"}).cache_dir
    assert tilde == Path("/home/me/kernels")


def test_without_a_home_the_cache_is_off(monkeypatch, caplog):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    settings = Settings.from_environment({})
    assert settings.cache_dir is None
    cache = KernelCache(settings, write, load, lambda arch: TOOLCHAIN)
    assert cache.load_or_compile(KEY, lambda: "first") == "first"
    assert "set SONIC_CACHE_DIR" in caplog.text


@pytest.mark.parametrize(
    ("environment", "pieces"),
    [
        ({"SONIC_CACHE": "readonly"}, ["SONIC_CACHE is 'readonly'", "rw, ro, off", "unset"]),
        ({"SONIC_CACHE": "RW"}, ["'RW'"]),
        ({"SONIC_CACHE": ""}, ["SONIC_CACHE is ''"]),
        ({"SONIC_COMPILE": "ahead"}, ["SONIC_COMPILE is 'ahead'", "all, needed", "unset"]),
        ({"SONIC_CACHE_DIR": ""}, ["SONIC_CACHE_DIR is ''", "absolute", "unset"]),
        ({"SONIC_CACHE_DIR": "kernels"}, ["'kernels'", "starts with / or ~"]),
    ],
)
def test_wrong_settings_are_refused(environment, pieces):
    with pytest.raises(ArgumentError) as caught:
        Settings.from_environment(environment)
    for piece in pieces:
        assert piece in str(caught.value)


def test_misspelt_settings_are_found():
    environment = {"SONIC_CACHE": "ro", "SONIC_CACHEDIR": "/x", "SONICS": "1"}
    assert unknown_variables(environment) == ["SONIC_CACHEDIR"]


def test_what_the_cache_holds_and_keeps(filled):
    directory, entry = filled
    other = dataclasses.replace(KEY, config=TileConfig(128, 192))
    for mode in CacheMode:
        cache = make(directory, mode)
        assert cache.keeps(Arch.SM90) == (mode is CacheMode.READ_WRITE)
        assert cache.holds(KEY) == (mode is not CacheMode.OFF) and not cache.holds(other)
    entry.rename(entry.with_suffix(".o"))
    assert make(directory).holds(KEY)


# ------------------------------------------------------------------------------ damage


def truncate(data):
    return data[: len(data) // 2]


def flip(position):
    def change(data):
        index = position % len(data)
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return change


@pytest.mark.parametrize(
    "damage",
    [truncate, flip(0), flip(500), flip(-1), flip(-20), lambda d: b"", lambda d: d + b"x"],
    ids=["half", "first", "middle", "mark", "digest", "empty", "longer"],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(filled, damage, caplog):
    directory, entry = filled
    entry.write_bytes(damage(entry.read_bytes()))
    assert make(directory).report(Arch.SM90).damaged == (entry,)
    assert make(directory, CacheMode.READ_ONLY).load_or_compile(KEY, lambda: "new") == "new"
    assert "damaged or incomplete" in caplog.text
    assert make(directory).load_or_compile(KEY, lambda: "second") == "loaded second"
    assert make(directory).load_or_compile(KEY, never) == "loaded second"
    assert make(directory).report(Arch.SM90).damaged == ()


def test_an_entry_that_does_not_load_is_replaced(filled, caplog):
    directory, entry = filled
    wrong = b"another symbol\nx\n"
    entry.write_bytes(wrong + cache_module._seal(wrong))
    assert make(directory).load_or_compile(KEY, lambda: "second") == "loaded second"
    assert "no sonic_rows_linear_bf16_sm90 in" in caplog.text


@pytest.mark.parametrize("at", ["write", "load", "replace"])
def test_a_kernel_that_cannot_be_kept_still_runs(directory, at, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    if at == "replace":
        monkeypatch.setattr(os, "replace", full)
    cache = make(directory, **({} if at == "replace" else {at: full}))
    assert cache.load_or_compile(KEY, lambda: "first") == "first"
    assert "No space left" in caplog.text
    assert [p for p in directory.rglob("*") if p.name.startswith(".new-")] == []


def test_a_directory_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = make(tmp_path / "file" / "kernels")
    for _ in range(3):
        assert cache.load_or_compile(KEY, lambda: "first") == "first"
    assert len(caplog.records) == 1 and "neither loaded" in caplog.text


def test_sources_edited_meanwhile_are_not_filed_under_the_old_key(directory, caplog):
    toolchain = dict(TOOLCHAIN)
    cache = make(directory, toolchain=toolchain)

    def compile_and_edit():
        toolchain["sources"] = "edited"
        return "mixture"

    assert cache.load_or_compile(KEY, compile_and_edit) == "mixture"
    assert "have changed" in caplog.text
    assert entries(directory) == []


# ------------------------------------------------------------------------------ processes, threads


def compile_in_process(directory, log, start, results):
    """One of many processes that miss the same entry at the same time."""

    def compile_kernel():
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return "first"

    start.wait()
    results.put(make(directory).load_or_compile(KEY, compile_kernel))


def spawn(target, *arguments):
    context = multiprocessing.get_context("spawn")
    # A daemon, so that a failed test does not wait for it at the end.
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def test_of_processes_that_miss_together_one_compiles(directory, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    log = tmp_path / "log"
    processes = [spawn(compile_in_process, directory, log, start, results) for _ in range(4)]
    assert [results.get(timeout=120) for _ in processes] == ["loaded first"] * 4
    for process in processes:
        process.join(60)
    assert len(log.read_text().splitlines()) == 1
    assert len(entries(directory)) == 1


def die_while_compiling(directory, compiling):
    def compile_kernel():
        compiling.set()
        time.sleep(600)

    make(directory).load_or_compile(KEY, compile_kernel)


def test_a_process_that_dies_while_compiling_blocks_nobody(directory):
    compiling = multiprocessing.get_context("spawn").Event()
    process = spawn(die_while_compiling, directory, compiling)
    assert compiling.wait(120)
    process.kill()
    process.join(60)
    started = time.monotonic()
    assert make(directory).load_or_compile(KEY, lambda: "first") == "loaded first"
    assert time.monotonic() - started < 30


def test_whoever_waits_too_long_compiles_beside_the_other(directory, monkeypatch, caplog):
    compiling = multiprocessing.get_context("spawn").Event()
    process = spawn(die_while_compiling, directory, compiling)
    assert compiling.wait(120)
    monkeypatch.setattr(cache_module, "_LOCK_SECONDS", 0.1)
    assert make(directory).load_or_compile(KEY, lambda: "second") == "loaded second"
    assert "without waiting" in caplog.text
    process.kill()
    process.join(60)


def test_threads_share_one_compilation(directory, monkeypatch):
    from sonic.runtime import launch

    class Backend:
        arch = Arch.SM90
        compiled = 0

        def supports(self, problem):
            return None

        def compile(self, problem, config):
            Backend.compiled += 1
            time.sleep(0.1)
            return "first"

    monkeypatch.setattr(launch, "kernel_cache", lambda: make(directory))
    monkeypatch.setattr(launch, "_kernels", {})
    kernels = []
    threads = [
        threading.Thread(
            target=lambda: kernels.append(launch.kernel_for(Backend(), KEY.problem, KEY.config))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels == ["loaded first"] * 8
    assert Backend.compiled == 1


# ------------------------------------------------------------------------------ permissions


def refused(directory, mode=CacheMode.READ_WRITE):
    """Whether a cache there compiles rather than load its entry."""
    return make(directory, mode).load_or_compile(KEY, lambda: "compiled") != "loaded first"


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("which", ["root", "folder"])
def test_directories_that_others_can_write_are_not_used(filled, which, bits, caplog):
    directory, entry = filled
    path = directory if which == "root" else entry.parent
    assert not refused(directory)
    path.chmod(bits)
    assert refused(directory)
    assert f"chmod go-w {path}" in caplog.text
    assert make(directory).obstacle(Arch.SM90) is not None
    assert entry.exists()


def test_a_parent_that_everyone_can_write_is_not_used(filled):
    directory, _ = filled
    directory.parent.chmod(0o777)
    assert refused(directory)
    directory.parent.chmod(0o1777)  # sticky: others cannot rename what is not theirs
    assert not refused(directory)


def test_files_that_others_can_write_are_replaced(filled, caplog):
    directory, entry = filled
    entry.chmod(0o622)
    assert refused(directory)
    assert "can be written by other users" in caplog.text
    assert entry.stat().st_mode & 0o777 == 0o600


def test_links_are_not_followed(filled):
    directory, entry = filled
    moved = entry.rename(directory / "elsewhere")
    entry.symlink_to(moved)
    assert refused(directory)
    assert not entry.is_symlink()


@needs_root
def test_files_and_directories_of_others_are_not_used(filled, caplog):
    directory, entry = filled
    os.chown(entry, OTHER_USER, 0)
    assert refused(directory)
    assert "belongs to another user" in caplog.text
    make(directory).load_or_compile(KEY, lambda: "first")
    os.chown(directory, OTHER_USER, 0)
    assert refused(directory)


@needs_root
def test_read_only_trusts_the_owner_of_the_directory_and_nobody_else(filled):
    directory, entry = filled
    for path in (directory, entry.parent, entry):
        os.chown(path, OTHER_USER, 0)
    assert not refused(directory, CacheMode.READ_ONLY)
    assert refused(directory)
    entry.parent.chmod(0o777)
    assert refused(directory, CacheMode.READ_ONLY)
    entry.parent.chmod(0o755)
    os.chown(entry, OTHER_USER + 1, 0)
    assert refused(directory, CacheMode.READ_ONLY)


# ------------------------------------------------------------------------------ real kernels

_LOAD_ONE = """
import sys
from sonic.runtime.backend import load_backend
from sonic.runtime.cache import KernelKey, kernel_cache
from sonic.runtime.launch import kernel_for
from sonic.runtime.problem import Arch, TileConfig, down_problem
import torch
backend, problem, config = load_backend(Arch.SM90), down_problem("bfloat16", False), TileConfig(128, 128)
(what,) = sys.argv[1:]
if what == "load":
    assert kernel_cache().load(KernelKey(Arch.SM90, problem, config)) is not None
kernel = kernel_for(backend, problem, config)
x, offsets = torch.zeros(8, 8), torch.zeros(2, dtype=torch.int32)
try:
    kernel(x, x[None], x, None, None, None, None, None, None, offsets, None, 0, 0, 1)
except (TypeError, ValueError) as error:
    print("refused:", str(error).replace(chr(10), " "))
print("cutlass" in sys.modules)
"""  # noqa: E501


def run_kernel_process(what, directory, environment=()):
    """In the copy of the sources that lies beside the cache."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_ONE, what],
        cwd=directory.parent,
        env={**os.environ, "SONIC_CACHE_DIR": str(directory), **dict(environment)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@needs_dsl
def test_a_real_kernel_is_loaded_by_a_fresh_process_without_cutedsl(directory):
    """Its host code runs: it refuses CPU tensors of the wrong dtype. It needs a GPU to do more."""
    copy_of_sources(directory.parent)
    first_refusal, imported = run_kernel_process("compile", directory)
    assert imported == "True"
    (entry,) = entries(directory)
    content = entry.read_bytes()
    refusal, imported = run_kernel_process("load", directory)
    assert imported == "False", "loading from the cache imported CuTeDSL"
    assert refusal == first_refusal and "argument #0" in refusal and "bfloat16" in refusal
    assert entry.read_bytes() == content
    entry.write_bytes(content[:5000])
    assert run_kernel_process("compile", directory)[1] == "True"
    assert len(entry.read_bytes()) > 20_000


@needs_dsl
def test_where_nothing_links_an_object_file_is_kept_and_loaded(directory):
    copy_of_sources(directory.parent)
    nothing = {"PATH": str(directory / "empty"), "CC": ""}
    first_refusal, _ = run_kernel_process("compile", directory, nothing)
    assert entries(directory) == []
    (entry,) = directory.rglob("*.o")
    refusal, imported = run_kernel_process("load", directory, nothing)
    assert refusal == first_refusal and imported == "True"
    if shutil.which("objdump") is None:
        pytest.skip("binutils is not installed: instructions of the host code not checked")
    listing = subprocess.run(["objdump", "-d", entry], capture_output=True, text=True, check=True)
    assert "xmm" in listing.stdout
    # Instructions of the compiling machine's CPU would trap on another one.
    for register in ("ymm", "zmm", "%k1"):
        assert register not in listing.stdout
