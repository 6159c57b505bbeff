"""A new number of tokens compiles nothing: what is compiled at first is all that any may choose."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.shapes import NAMED_SHAPES
from kernels_sm90 import BACKEND, choice
from kernels_sm90.tiles import supports_config
from sonic import cli
from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime import launch
from sonic.runtime.cache import KernelCache
from sonic.runtime.columns import column_slices, slice_widths
from sonic.runtime.errors import CompileError
from sonic.runtime.limits import MAX_SLOTS
from sonic.runtime.problem import Arch, layer_problems
from sonic.runtime.settings import CacheMode, CompileMode, Settings
from sonic.triton import parts
from tests.layer_launches import run_stages

SMALL = cli.LayerSize(1, 512, 128, 16, 1)  # cut into slices of columns where it has many rows
HOW = (ActivationType.SWIGLU, "bfloat16", False)


def sizes() -> list[cli.LayerSize]:
    """Those of the benchmark, and others drawn at random."""
    generator = random.Random(0)
    drawn = [
        cli.LayerSize(
            1,
            8 * generator.randint(1, 1024),
            8 * generator.randint(1, 512),
            experts := generator.randint(1, 512),
            generator.randint(1, min(experts, 16)),
        )
        for _ in range(12)
    ]
    named = [cli.LayerSize(*named.shape.problem) for named in NAMED_SHAPES]
    return named + drawn


def numbers_of_tokens(size: cli.LayerSize) -> list[int]:
    """From 1 to the most that kernels take: where rows per expert or slices change, and between."""
    most = (MAX_SLOTS + 1) // 2 // size.top_k
    rows_per_expert = {*range(0, 1400, 50), 127, 128, 129, 1023, 1024, 1025}
    turns = [rows * size.experts // size.top_k for rows in rows_per_expert]
    # A row more of tiles, and with it one slice more.
    turns += [128 * step // size.top_k for step in range(0, 4000, 100)]
    near = {tokens + step for tokens in turns for step in (-1, 0, 1)}
    far = {most >> shift for shift in range(most.bit_length())}
    return sorted(tokens for tokens in near | far if 1 <= tokens <= most)


# ------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("size", sizes(), ids=str)
@pytest.mark.parametrize("gpu", BACKEND.gpus)
@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU_SQ])
def test_any_number_of_tokens_chooses_from_what_is_compiled(size, gpu, activation):
    backend, how = BACKEND.for_gpu(gpu), (activation, "bfloat16", True)
    compiled = cli.layer_kernels_of_any_tokens(backend.default_configs, size, *how)
    chosen = set()
    for tokens in numbers_of_tokens(size):
        chosen |= set(cli.layer_kernels(backend.default_config, replace(size, tokens=tokens), *how))
    assert chosen <= set(compiled) and len(set(compiled)) == len(compiled)
    assert len(compiled) <= 34, "every one is seconds of a first call"


@pytest.mark.parametrize("activation", list(ActivationType))
@pytest.mark.parametrize("accumulate", [False, True])
def test_tiles_of_any_rows_are_all_that_are_chosen(activation, accumulate):
    generator = random.Random(1)
    for problem in layer_problems(activation, "float16", False, accumulate):
        for _ in range(4):
            n, k = (8 * generator.randint(1, 1024) for _ in range(2))
            size = problem, n, k, generator.choice((1, 2, 8, 32, 128, 512, 65_536))
            rows = (*range(0, 1500), *range(1500, 5000, 16), *(2**power for power in range(12, 31)))
            chosen = {choice.default_config(problem, count, *size[1:]) for count in rows}
            assert set(choice.default_configs(*size)) == chosen
            assert chosen <= set(choice.candidates(problem))
            assert all(supports_config(problem, config) is None for config in chosen)


@pytest.mark.parametrize(
    ("columns", "other"),
    [
        (4096, 2048),
        (2048, 1536),
        (1536, 512),
        (2880, 8),
        (7168, 4096),
        (200, 8),
        (1024, 1024),
        (512, 4096),
    ],
)
def test_widths_of_slices_are_all_that_are_cut(columns, other):
    cut = {
        width
        for rows in (*range(1, 400_000, 97), 2**20, 2**25, 2**30)
        for _, width in column_slices(rows, columns, 2, rows * other * 2)
    }
    assert set(slice_widths(columns, other)) == cut
    assert slice_widths(columns, other)[0] == columns


# ------------------------------------------------------------------------------ what is compiled


class Kernel(str):
    """What a compiler returned, which can be kept and called."""

    def __call__(self, *arguments):
        pass


class Counting:
    """The backend, with a compiler that only counts."""

    arch = Arch.SM90
    default_config = staticmethod(BACKEND.default_config)
    default_configs = staticmethod(BACKEND.default_configs)

    def __init__(self, fails=lambda config: False):
        self.compiled = []
        self.fails = fails

    def supports(self, problem):
        return BACKEND.supports(problem)

    def compile(self, problem, config):
        if self.fails(config):
            raise RuntimeError("out of registers")
        self.compiled.append((problem, config))
        return Kernel(f"{problem.name} {config.name}")


def write(compiled, folder, symbol):
    path = folder / "kernel.so"
    path.write_text(compiled)
    return path


def load(path, symbol):
    return Kernel(path.name)


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Starts a process, so to speak: nothing is loaded, and all share one cache."""
    tmp_path.chmod(0o700)

    def start(mode=CompileMode.ALL, cache=CacheMode.READ_WRITE, **changes):
        from sonic import stages

        backend = Counting(**changes)
        settings = Settings(cache, tmp_path / "kernels", mode)
        kernels = KernelCache(settings, write, load, lambda arch: {"sources": "one"})
        monkeypatch.setattr(launch, "kernel_cache", lambda: kernels)
        monkeypatch.setattr(launch, "backend_for", lambda device: backend)
        monkeypatch.setattr(launch, "_tuned", lambda backend, device: {})
        monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
        monkeypatch.setattr(launch, "_kernels", {})
        monkeypatch.setattr(parts, "add_parts", lambda *_: None)
        monkeypatch.setattr(stages, "prepared", launch.prepared.__wrapped__)
        monkeypatch.setattr(stages, "fill_cache", lambda *_, **__: None)
        launch.forget_tiles()
        return backend

    yield start
    launch.forget_tiles()


def run(tokens, size=SMALL):
    size = replace(size, tokens=tokens)
    run_stages(size, HOW[0], GateUpLayout.INTERLEAVED, torch.bfloat16)


@pytest.mark.parametrize("first", [1, 300, 4096])
def test_the_first_call_compiles_for_all_others(process, first):
    backend = process()
    run(first)
    expected = cli.layer_kernels_of_any_tokens(BACKEND.default_configs, SMALL, *HOW)
    assert len(backend.compiled) == len(expected) and set(backend.compiled) == set(expected)
    backend.compiled.clear()
    for tokens in (1, 2, 255, 256, 257, 258, 300, 1000, 2047, 2048, 2049, 4096):
        run(tokens)
    assert not backend.compiled


def test_a_second_process_compiles_nothing(process):
    process()
    run(1)
    other = process()
    for tokens in (4096, 300, 1):
        run(tokens)
    assert not other.compiled


def test_what_an_interrupted_process_left_out_is_compiled(process):
    process(CompileMode.NEEDED)
    run(1)
    later = process()
    run(1)
    assert later.compiled
    both = process()
    for tokens in (300, 4096):
        run(tokens)
    assert not both.compiled


@pytest.mark.parametrize(
    ("mode", "cache"),
    [
        (CompileMode.NEEDED, CacheMode.READ_WRITE),
        (CompileMode.ALL, CacheMode.READ_ONLY),
        (CompileMode.ALL, CacheMode.OFF),
    ],
)
def test_only_what_is_needed_where_nothing_is_kept_or_so_asked(process, mode, cache):
    backend = process(mode, cache)
    run(1)
    assert len(backend.compiled) == len(set(backend.compiled)) == 9
    run(40_000)
    assert len(backend.compiled) > 9


def test_a_kernel_that_nobody_needs_yet_may_fail(process, caplog):
    needed = cli.layer_kernels(BACKEND.default_config, SMALL, *HOW)
    backend = process(fails=lambda config: config not in {tiles for _, tiles in needed})
    run(1)
    assert "other numbers of tokens is missing" in caplog.text
    assert "out of registers" in caplog.text
    failures = caplog.text.count("is missing")
    run(2)
    assert caplog.text.count("is missing") == failures, "tried once"
    assert backend.compiled
    with pytest.raises(CompileError, match="out of registers"):
        run(40_000)


def test_slices_of_a_wide_layer_are_compiled_with_the_whole(process):
    from sonic import stages

    size = cli.LayerSize(4, 2880, 8, 2, 1)
    widths = slice_widths(size.hidden, 2 * size.intermediate)
    backend = process()
    dh = torch.zeros(4, 16, dtype=torch.bfloat16)
    w1 = torch.zeros(2, 16, size.hidden, dtype=torch.bfloat16)
    offsets = torch.zeros(3, dtype=torch.int32)
    layout = {"layout": GateUpLayout.INTERLEAVED, "gated": True}
    stages.up_backward_act(dh, w1, offsets, **layout, hidden_size=size.hidden)
    backend.compiled.clear()
    for columns in widths:
        part = w1.narrow(2, 0, columns)
        stages.up_backward_act(dh, part, offsets, **layout, hidden_size=size.hidden)
    assert len(widths) > 2 and not backend.compiled
