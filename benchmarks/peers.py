"""The layer as other packages compute it, from the same tensors, beside ours.

Every contender gets one :class:`benchmarks.layer.Layer`: x (T,H), w1 (E,2I,H) interleaved, w2
(E,H,I), ids (T,top_k) and fp32 weights, SwiGLU without bias; and makes the output and the gradients
of x, w1, w2 and the weights. Sorting and index tensors are part of its time; the router is not.

``sonicmoe``        sonic-moe 0.1.2.post1 (PyPI, ``--no-deps``) on quack-kernels 0.6.5. quack takes
                    every file outside of a directory ``site-packages`` for its user's own code, and
                    refuses what it meets in CuTeDSL 4.8: install both below one of that name.
``torch``           ``grouped_mm`` with gathers that are not differentiated by accumulation and the
                    weights folded in before the down projection: the best eager layer we know.
``triton_kernels``  of the triton repository (``matmul_ogs``), forward only, which routes from
                    logits, here ones that lead to the given ids and weights, and whose SwiGLU is
                    ``silu(g) * (u + 1)``. ``triton-kernels/torch-ext`` of github.com/huggingface/
                    kernels-community has it for Triton 3.6, to be put on ``PYTHONPATH``; the
                    package of that name on PyPI is another one.
``bound``           no layer: balanced cuBLAS products of the same FLOPs and copies of the bytes
                    that the two gather-sums move.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any, Protocol

import torch

from benchmarks.layer import Layer, experts_forward, gradient_inputs

Gradients = tuple[torch.Tensor, ...]  # of x, w1, w2 and the weights of the slots


class Contender(Protocol):
    """One implementation of a layer. ``forward`` keeps what ``backward`` needs, unlike
    ``inference``."""

    def inference(self) -> torch.Tensor: ...

    def forward(self) -> torch.Tensor: ...

    def backward(self, out: torch.Tensor) -> Gradients: ...


class _Differentiated:
    """A contender that torch's autograd differentiates."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.leaves: Gradients = tuple(gradient_inputs(layer, with_router=False).values())

    def inference(self) -> torch.Tensor:
        with torch.no_grad():
            return self.forward()

    def forward(self) -> torch.Tensor:
        raise NotImplementedError

    def backward(self, out: torch.Tensor) -> Gradients:
        return torch.autograd.grad(out, self.leaves, self.layer.dout)


class Sonic(_Differentiated):
    def forward(self) -> torch.Tensor:
        return experts_forward(self.layer)


# ---------------------------------------------------------------------------------- sonicmoe


class SonicMoE(_Differentiated):
    """Its layer of fixed top-k, entered behind its router: the faster of its two paths."""

    def inference(self) -> torch.Tensor:
        with torch.no_grad():
            return self._run(inference=True)

    def forward(self) -> torch.Tensor:
        return self._run(inference=False)

    def _run(self, inference: bool) -> torch.Tensor:
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import _DownProjection, _UpProjection

        layer, swiglu = self.layer, ActivationType.SWIGLU
        T, top_k = layer.topk_ids.shape
        w1, w2 = layer.w1.permute(1, 2, 0), layer.w2.permute(1, 2, 0)
        offsets, token_by_row, slot_by_row, row_by_slot = self._metadata()
        rows = token_by_row, slot_by_row, row_by_slot, None, False
        a, h = _UpProjection.apply(
            layer.x, w1, None, offsets, T * top_k, top_k, *rows, swiglu, inference, False
        )
        out: torch.Tensor = _DownProjection.apply(
            a, h, w2, None, layer.topk_weights, offsets, T, top_k, *rows, swiglu
        )
        return out

    def _metadata(self) -> tuple[torch.Tensor, ...]:
        from sonicmoe.functional.triton_kernels import TC_topk_router_metadata_triton

        ids, E = self.layer.topk_ids, self.layer.shape.E
        counts, offsets, token_by_row, slot_by_row, row_by_slot = (
            torch.empty(size, dtype=torch.int32, device=ids.device)
            for size in (E, E + 1, ids.numel(), ids.numel(), ids.numel())
        )
        TC_topk_router_metadata_triton(
            ids, E, counts, offsets, token_by_row, slot_by_row, row_by_slot
        )
        return offsets, token_by_row, slot_by_row, row_by_slot


# Tiles of quack that were the fastest, or within 3% of it, for one of the six GEMMs of the shapes A
# to F on an H200 (2026-11-20): rows, columns, ping-pong.
_GOOD_TILES = {
    (128, 256, False),
    (256, 192, False),
    (128, 128, True),
    (128, 160, True),
    (128, 192, True),
    (192, 128, True),
}
_TUNING_LAUNCHES = 8
TUNINGS = ("full", "good")  # all tiles, or _GOOD_TILES


def _short_measurement(
    function: Callable[..., object],
    arg_sets: list[tuple[Any, ...]],
    kwarg_sets: list[dict[str, Any]],
    extra_kwargs: dict[str, Any],
    quantiles: tuple[float, ...] | None = None,
    **_: object,
) -> Any:
    """Milliseconds of one launch, as quack's own function over rotating inputs, in 8 launches
    instead of 250."""

    def launch(index: int) -> None:
        which = index % len(arg_sets)
        function(*arg_sets[which], **kwarg_sets[which], **extra_kwargs)

    for index in range(2):
        launch(index)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_TUNING_LAUNCHES + 1)]
    events[0].record()
    for index, event in enumerate(events[1:]):
        launch(index)
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    times = sorted(before.elapsed_time(after) for before, after in pairs)
    median = times[len(times) // 2]
    return [median for _ in quantiles] if quantiles else median


def shorten_tuning(good_tiles_only: bool) -> None:
    """Make SonicMoE's tuning at a new size take seconds: minutes otherwise, at every token count.

    ``good_tiles_only`` also leaves out what was never near the best (``_GOOD_TILES``), so that two
    thirds of the kernels need not be compiled.
    """
    import quack.autotuner
    from sonicmoe.functional.reduction_over_k_gather import token_gather_sum_kernel

    quack.autotuner._bench_cuda_graph_l2_rotate = _short_measurement
    if not good_tiles_only:
        return
    original = quack.autotuner.Autotuner.prune_configs

    @functools.wraps(original)
    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        allowed = original(self, kwargs)
        good = [config for config in allowed if _is_good(config.all_kwargs().get("config"))]
        return good or allowed

    quack.autotuner.Autotuner.prune_configs = prune_configs
    token_gather_sum_kernel.configs = [
        config
        for config in token_gather_sum_kernel.configs
        if config.kwargs["BLOCK_H"] in (512, 1024, 2048) and config.kwargs["BLOCK_K"] <= 16
    ]


def _is_good(config: Any) -> bool:
    return (config.tile_m, config.tile_n, config.pingpong) in _GOOD_TILES


# ------------------------------------------------------------------------------------- torch


def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: torch.Tensor = function(rows, weight.transpose(1, 2), offs=offsets)
    return out


class _Gather(torch.autograd.Function):
    """Rows of tokens, (T,H) -> (R,H); its gradient is the gather-sum."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, token_by_row: torch.Tensor, row_by_slot: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_by_slot)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token_by_row)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_by_slot,) = ctx.saved_tensors
        rows = gradient.index_select(0, row_by_slot)
        return rows.view(ctx.tokens, -1, gradient.shape[1]).sum(1), None, None


class _GatherSum(torch.autograd.Function):
    """Sum of a token's rows, (R,H) -> (T,H); its gradient is the gather."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, tokens: int, token_by_row: torch.Tensor, by_slot: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(token_by_row)
        return rows.index_select(0, by_slot).view(tokens, -1, rows.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (token_by_row,) = ctx.saved_tensors
        return gradient.index_select(0, token_by_row), None, None, None


class TorchGroupedMM(_Differentiated):
    """Holds a copy of w1 with the gates before the ups, the order that ``chunk`` wants."""

    def __init__(self, layer: Layer):
        super().__init__(layer)
        w1 = layer.w1.detach()
        self.w1 = torch.cat((w1[:, 0::2], w1[:, 1::2]), dim=1).requires_grad_()
        x, _, w2, weights = self.leaves
        self.leaves = (x, self.w1, w2, weights)

    def forward(self) -> torch.Tensor:
        layer = self.layer
        T, top_k = layer.topk_ids.shape
        ids = layer.topk_ids.flatten()
        slot_by_row = ids.argsort(stable=True)
        counts = torch.zeros(layer.shape.E, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, ids.long(), torch.ones_like(ids, dtype=torch.int32))
        offsets = counts.cumsum(0, dtype=torch.int32)
        token_by_row = slot_by_row // top_k
        row_by_slot = torch.empty_like(slot_by_row)
        row_by_slot[slot_by_row] = torch.arange(T * top_k, device=ids.device)
        rows = _Gather.apply(layer.x, token_by_row, row_by_slot)
        gate, up = _grouped_mm(rows, self.w1, offsets).chunk(2, dim=-1)
        weight_by_row = layer.topk_weights.flatten()[slot_by_row].to(rows.dtype)
        a = torch.nn.functional.silu(gate) * up * weight_by_row.unsqueeze(1)
        out: torch.Tensor = _GatherSum.apply(
            _grouped_mm(a, layer.w2, offsets), T, token_by_row, row_by_slot
        )
        return out

    @staticmethod
    def interleaved(dw1: torch.Tensor) -> torch.Tensor:
        """Gradient of w1 in the order of the other contenders."""
        gate, up = dw1.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)


# ---------------------------------------------------------------------------- triton_kernels


_NEVER = -1e4  # a logit that no top-k takes


def with_routing_logits(layer: Layer) -> Layer:
    """``layer`` with fp32 logits (T,E) of which the top-k, and the softmax over it, are its ids and
    weights; a token's ids have to be distinct."""
    weights = layer.topk_weights.detach().float()
    logits = weights.new_full((layer.shape.T, layer.shape.E), _NEVER)
    return replace(layer, logits=logits.scatter_(1, layer.topk_ids.long(), weights.log()))


class TritonKernels:
    """Forward only, with its own top-k from logits inside the time; see
    :func:`with_routing_logits`, without which it works on other pairs than the others."""

    def __init__(self, layer: Layer):
        self.layer = with_routing_logits(layer)

    @torch.no_grad()
    def inference(self) -> torch.Tensor:
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
        from triton_kernels.routing import routing
        from triton_kernels.swiglu import swiglu_fn

        layer, precision = self.layer, PrecisionConfig()
        data, gather, scatter = routing(layer.logits, layer.shape.top_k)
        swiglu = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.0, None), 2)
        a = matmul_ogs(
            layer.x,
            layer.w1.mT,
            None,
            data,
            gather_indx=gather,
            precision_config=precision,
            fused_activation=swiglu,
        )
        out: torch.Tensor = matmul_ogs(
            a,
            layer.w2.mT,
            None,
            data,
            scatter_indx=scatter,
            precision_config=precision,
            gammas=data.gate_scal,
        )
        return out

    def forward(self) -> torch.Tensor:
        raise NotImplementedError("triton_kernels has no backward pass")

    def backward(self, out: torch.Tensor) -> Gradients:
        raise NotImplementedError("triton_kernels has no backward pass")


# ------------------------------------------------------------------------------------- bound


class Bound:
    """What the same FLOPs cost as ``torch.bmm`` with equally many rows for every expert, and the
    same bytes of the gather-sums as copies. No gather, no activation, no index.

    ``scale`` corrects for rows that do not divide by the number of experts.
    """

    def __init__(self, layer: Layer):
        shape, x = layer.shape, layer.x
        rows = max(1, round(shape.rows / shape.E))
        self.scale = shape.rows / (rows * shape.E)
        self.w1, self.w2 = layer.w1.detach(), layer.w2.detach()

        def make(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=x.dtype, device=x.device)

        self.x, self.dout = make(shape.E, rows, shape.H), make(shape.E, rows, shape.H)
        self.h, self.a = make(shape.E, rows, 2 * shape.I), make(shape.E, rows, shape.I)
        # A gather-sum reads R rows and writes T; a copy reads and writes what it copies.
        elements = (shape.rows + shape.T) * shape.H // 2
        self.source = torch.empty(elements, dtype=x.dtype, device=x.device)
        self.target = torch.empty_like(self.source)

    def inference(self) -> torch.Tensor:
        return self.forward()

    def forward(self) -> torch.Tensor:
        torch.bmm(self.x, self.w1.mT)
        torch.bmm(self.a, self.w2.mT)
        return self.target.copy_(self.source)

    def backward(self, out: torch.Tensor) -> Gradients:
        del out
        torch.bmm(self.dout, self.w2)
        torch.bmm(self.h, self.w1)
        self.target.copy_(self.source)
        return torch.bmm(self.dout.mT, self.a), torch.bmm(self.h.mT, self.x)


# -------------------------------------------------------------------------------------- list

OURS, PEER, BOUND = "sonic", "sonicmoe", "bound"
CONTENDERS: dict[str, Callable[[Layer], Contender]] = {
    OURS: Sonic,
    PEER: SonicMoE,
    "torch": TorchGroupedMM,
    "triton_kernels": TritonKernels,
    BOUND: Bound,
}
FORWARD_ONLY = frozenset({"triton_kernels"})
NEEDS_LOGITS = frozenset({"triton_kernels"})
_MODULES = {
    "sonicmoe": ("sonicmoe.functional", "quack.gemm_interface"),
    "triton_kernels": ("triton_kernels.matmul_ogs", "triton_kernels.routing"),
}
_DISTRIBUTIONS = {
    "sonicmoe": ("sonic-moe", "quack-kernels"),
    "torch": ("torch",),
    "triton_kernels": ("triton-kernels",),
}


def function_of(name: str, layer: Layer) -> Layer | None:
    """The layer whose values the contender ``name`` computes when it is given ``layer``, or None of
    one that computes no layer."""
    if name == BOUND:
        return None
    if name != "triton_kernels":
        return layer
    b1 = torch.zeros(layer.w1.shape[:2], dtype=layer.w1.dtype, device=layer.w1.device)
    b1[:, 1::2] = 1.0  # silu(g) * (u + 1)
    return replace(layer, b1=b1)


def obstacle(name: str) -> str | None:
    """Why a contender cannot run here, or ``None``; imports what it needs."""
    for module in _MODULES.get(name, ()):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an import raises, that peer does not take part
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


def versions(name: str) -> str:
    """Distributions of a contender with their versions, as one line."""
    found = []
    for distribution in _DISTRIBUTIONS.get(name, ()):
        try:
            found.append(f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            found.append(f"{distribution} of unknown version")
    return ", ".join(found)
