"""Token rounding in the benchmarks: the layer with it, its check, and its counts.

Symbols: T tokens, E experts, q the tile whose multiples the experts' counts become.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.check import Finding, _Stream, check_layer, exact_matmuls
from benchmarks.layer import Layer, Run, call_moe, gradient_inputs
from benchmarks.shapes import Shape
from sonic.enums import ScoreOrder

ROUTINGS = ("top_k", "nr", "sr", "nr-s", "balance-f", "up", "down")
_SEED = 7


@dataclass(frozen=True)
class RoundedShape:
    """Size of a layer, and the tile q that its experts' counts are rounded to."""

    shape: Shape
    tile: int

    @classmethod
    def parse(cls, text: str) -> "RoundedShape":
        """Read ``T,H,I,E,top_k,q``; raises ``ValueError`` when it is not six positive integers."""
        size, _, tile = text.rpartition(",")
        try:
            shape = Shape.parse(size)
            rows = int(tile)
        except ValueError as error:
            if "exceeds" in str(error):
                raise
            rows = 0
        if rows < 1:
            raise ValueError(f"expected six positive integers T,H,I,E,top_k,q, got {text!r}")
        return cls(shape, rows)


@dataclass(frozen=True)
class Load:
    """Pairs that the experts work on, and rows of the tiles that these pairs occupy."""

    routed: int
    hardware: int

    @property
    def waste(self) -> float:
        """Percentage of the tiles' rows that hold no pair."""
        return 100 * (1 - self.routed / self.hardware) if self.hardware else 0.0


@dataclass(frozen=True)
class Rounding:
    """A routing of ``ROUTINGS`` on tile q; random rules draw the same numbers at every call."""

    name: str
    tile: int
    generator: torch.Generator

    @classmethod
    def make(cls, name: str, tile: int, device: torch.device) -> "Rounding":
        return cls(name, tile, torch.Generator(device=device))

    def seeded(self) -> torch.Generator:
        return self.generator.manual_seed(_SEED)


def moe_forward(layer: Layer, rounding: Rounding) -> torch.Tensor:
    """Output (T,H): router GEMM, scores, rounding, plan and experts."""
    return _moe(layer, rounding)[0]


def _moe(layer: Layer, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {}
    if rounding.name != "top_k":
        options = {"rounding": rounding.name, "generator": rounding.seeded()}
    return call_moe(layer, tile=rounding.tile, **options)


def routing_forward(layer: Layer, rounding: Rounding, logits: torch.Tensor) -> torch.Tensor:
    """What lies between the router GEMM and the experts: scores, selection and plan."""
    from sonic.plan import build_plan
    from sonic.routing import rounding_scores, token_rounding_plan, topk_routing

    top_k, order = layer.shape.top_k, layer.options.score_order
    if rounding.name == "top_k":
        weights, ids = topk_routing(logits, top_k, order=order)
        build_plan(ids, layer.shape.E)
        return weights
    scores = rounding_scores(logits, top_k, order=order)
    weights, _ = token_rounding_plan(scores, top_k, rounding.tile, rounding.name, rounding.seeded())
    return weights


def load_of(layer: Layer, rounding: Rounding) -> Load:
    """Waits for the device; not for timed regions."""
    with torch.no_grad():
        counts = _moe(layer, rounding)[2]
    tiles = (counts + rounding.tile - 1) // rounding.tile
    return Load(int(counts.sum()), int(tiles.sum()) * rounding.tile)


# --- check ----------------------------------------------------------------------------------------


class _RoundedStream(_Stream):
    """The streamed reference, given pairs as a table that is padded with the expert E."""

    def _logit_gradient(self, score_gradient: torch.Tensor) -> torch.Tensor:
        top_k = self.top_k
        with torch.enable_grad():
            leaf = self.layer.logits.detach().to(self.wide).requires_grad_()
            scale = leaf if self.over_all else leaf.topk(top_k, dim=1).values
            scores = torch.exp(leaf - scale.logsumexp(dim=1, keepdim=True))
            padded = torch.nn.functional.pad(scores, (0, 1))
            scores = padded.gather(1, self.layer.topk_ids.long())
            (gradient,) = torch.autograd.grad(scores, leaf, score_gradient)
        return gradient

    def __init__(self, layer: Layer, runs: list[Run], top_k: int) -> None:
        super().__init__(layer, runs)
        self.top_k = top_k
        self.over_all = layer.options.score_order is ScoreOrder.TOPK_OVER_SOFTMAX


def check_rounded_layer(layer: Layer, rounding: Rounding) -> list[Finding]:
    """Pairs exactly, then output and every gradient against the streamed reference."""
    if rounding.name == "top_k":
        return check_layer(layer)
    with exact_matmuls():
        finding, pairs = _check_pairs(layer, rounding)
        table, slot_of_pair = _as_table(layer, pairs)
        runs = [_run_flat(table, pairs, slot_of_pair), _run_moe(layer, rounding)]
        with torch.no_grad():
            stream = _RoundedStream(table, runs, layer.shape.top_k)
            return [finding, *stream.findings()]


def _check_pairs(
    layer: Layer, rounding: Rounding
) -> tuple[Finding, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The kept pairs, compared with those of the torch implementation on the CPU."""
    from sonic.routing import rounding_scores, token_rounding

    top_k, E = layer.shape.top_k, layer.shape.E
    with torch.no_grad():
        scores = rounding_scores(layer.logits, top_k, order=layer.options.score_order)
        options = (top_k, rounding.tile, rounding.name)
        pairs = token_rounding(scores, *options, rounding.seeded())
        uniform = torch.rand(E, device=scores.device, generator=rounding.seeded()).cpu()
        expected = torch.ops.sonic.token_rounding(scores.cpu(), uniform, *options)
    weights, token_ids, expert_ids, offset_by_expert, *_ = expected
    actual = [tensor.cpu() for tensor in pairs]
    same = [
        torch.equal(ours, theirs)
        for ours, theirs in zip(actual, (token_ids, expert_ids, weights), strict=True)
    ]
    counts = offset_by_expert.diff()
    whole = bool(((counts % rounding.tile == 0) | (counts == layer.shape.T)).all())
    passed = all(same) and whole
    error = 0.0 if passed else math.inf
    note = "must be equal, counts in whole tiles"
    live = pairs[0] < layer.shape.T
    kept = (pairs[0][live], pairs[1][live], pairs[2][live])
    return Finding("routing", "pairs", passed, error, 0.0, error, note=note), kept


def _as_table(
    layer: Layer, pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[Layer, torch.Tensor]:
    """The layer with the pairs as ids and weights (T, most experts of a token), and the place of
    each pair in the flattened table."""
    token_ids, expert_ids, weights = pairs
    T, E = layer.shape.T, layer.shape.E
    tokens = token_ids.long()
    per_token = torch.bincount(tokens, minlength=T)
    width = max(1, int(per_token.max()))
    first = per_token.cumsum(0) - per_token
    slot = tokens * width + torch.arange(tokens.numel(), device=tokens.device) - first[tokens]
    ids = torch.full((T * width,), E, dtype=torch.int32, device=tokens.device)
    ids[slot] = expert_ids
    table = torch.zeros(T * width, device=tokens.device)
    table[slot] = weights
    padded = replace(
        layer,
        shape=replace(layer.shape, top_k=width),
        topk_ids=ids.view(T, width),
        topk_weights=table.view(T, width),
    )
    return padded, slot


def _run_flat(
    layer: Layer,
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slot_of_pair: torch.Tensor,
) -> Run:
    """General routing from the given pairs."""
    import sonic

    token_ids, expert_ids, weights = pairs
    leaf = weights.clone().requires_grad_()
    out = sonic.experts_flat(
        layer.x,
        token_ids,
        expert_ids,
        leaf,
        layer.w1,
        layer.w2,
        b1=layer.b1,
        b2=layer.b2,
        activation=layer.options.activation,
        layout=layer.options.layout,
        impl=layer.options.impl,
    )
    leaves = gradient_inputs(layer, with_router=False) | {"dtopk_weights": leaf}
    gradients = torch.autograd.grad(out, tuple(leaves.values()), layer.dout)
    named = dict(zip(leaves, gradients, strict=True))
    table = torch.zeros_like(layer.topk_weights).flatten()
    named["dtopk_weights"] = table.index_copy(0, slot_of_pair, named["dtopk_weights"]).view_as(
        layer.topk_weights
    )
    return Run("flat", {"out": out.detach()} | named, with_router=False)


def _run_moe(layer: Layer, rounding: Rounding) -> Run:
    out = moe_forward(layer, rounding)
    leaves = gradient_inputs(layer, with_router=True)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), layer.dout)
    named = dict(zip(leaves, gradients, strict=True))
    return Run("moe", {"out": out.detach()} | named, with_router=True)


# --- times ----------------------------------------------------------------------------------------


def timed_functions(layer: Layer, rounding: Rounding) -> dict[str, Callable[[], object]]:
    """What is timed, by name: the whole layer, and its routing alone, forward and with backward."""
    leaves = tuple(gradient_inputs(layer, with_router=True).values())
    logits = layer.logits.detach().requires_grad_()
    with torch.no_grad():
        dweights = torch.ones_like(routing_forward(layer, rounding, logits))

    def layer_step() -> object:
        return torch.autograd.grad(moe_forward(layer, rounding), leaves, layer.dout)

    def routing_step() -> object:
        return torch.autograd.grad(routing_forward(layer, rounding, logits), logits, dweights)

    return {
        "forward": functools.partial(moe_forward, layer, rounding),
        "forward + backward": layer_step,
        "routing forward": functools.partial(routing_forward, layer, rounding, logits),
        "routing forward + backward": routing_step,
    }
