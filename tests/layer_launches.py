"""Which kernels a layer asks for, found by running its stages without launching anything."""

import shutil
from pathlib import Path

import pytest
import torch

from sonic.enums import ActivationType, GateUpLayout

_ROOT = Path(__file__).parents[1]


def copy_of_sources(folder):
    """A checkout of its own, in which nobody edits between the processes of a test."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("sonic", "kernels_sm90", "kernels_sm100"):
        shutil.copytree(_ROOT / package, folder / package, ignore=ignored)
    (folder / "tests").mkdir()
    shutil.copy(__file__, folder / "tests")
    return folder


def kernels_of_stages(default_config, size, activation, layout, dtype):
    """(problem, tiles) of every launch of the six GEMM stages, accumulating ones included.

    :param size: a ``sonic.cli.LayerSize``.
    """
    from sonic import stages
    from sonic.runtime import launch

    asked = []

    class Backend:
        pass

    def kernel_for(backend, problem, config):
        asked.append((problem, config))
        return lambda *arguments: None

    Backend.default_config = staticmethod(default_config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend_for", lambda device: Backend)
        patch.setattr(launch, "kernel_for", kernel_for)
        patch.setattr(launch, "_tuned", lambda backend, device: {})
        patch.setattr(launch, "_multiprocessors", lambda device: 132)
        patch.setattr(stages.parts, "add_parts", lambda *_: None)
        patch.setattr(stages, "prepared", launch.prepared.__wrapped__)  # nothing from before
        patch.setattr(stages, "compile_ahead", lambda *_: None)
        patch.setattr(stages, "fill_cache", lambda *_, **__: None)
        run_stages(size, ActivationType(activation), GateUpLayout(layout), dtype)
    return asked


def run_stages(size, activation, layout, dtype):
    """Every GEMM stage of a layer, accumulating ones included, on CPU tensors."""
    from sonic import stages

    rows, gated = size.tokens * size.top_k, activation.is_gated
    width = size.intermediate * (2 if gated else 1)
    x = torch.zeros(size.tokens, size.hidden, dtype=dtype)
    w1 = torch.zeros(size.experts, width, size.hidden, dtype=dtype)
    w2 = torch.zeros(size.experts, size.hidden, size.intermediate, dtype=dtype)
    token_by_row = torch.zeros(rows, dtype=torch.int32)
    offsets = torch.zeros(size.experts + 1, dtype=torch.int32)
    for store_preact in (False, True):
        h, a = stages.up_forward(
            x, w1, None, token_by_row, offsets,
            activation=activation, layout=layout, store_preact=store_preact,
        )  # fmt: skip
    stages.down_forward(a, w2, None, offsets)
    score = torch.zeros(rows)
    dh, a_scaled, _ = stages.down_backward_act(
        x, w2, h, score, token_by_row, offsets, activation=activation
    )
    stages.up_backward_act(dh, w1, offsets, layout=layout, gated=gated, hidden_size=size.hidden)
    for into1, into2 in ((None, None), (w1.float(), w2.float())):
        stages.down_backward_weight(x, a_scaled, token_by_row, offsets, accumulate_into=into2)
        stages.up_backward_weight(
            x, dh, token_by_row, offsets, layout=layout, gated=gated, accumulate_into=into1
        )
