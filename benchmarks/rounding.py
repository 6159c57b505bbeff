"""Token rounding in the benchmarks: the layer with it, its check, and its counts.

Symbols: T tokens, E experts, q the tile whose multiples the experts' counts become.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.agreement import PEER_ALLOWANCE
from benchmarks.check import (
    Finding,
    _Stream,
    check_layer,
    check_runs,
    exact_finding,
    exact_matmuls,
    finding_of,
)
from benchmarks.contest import _Clock, take_turns
from benchmarks.launches import captured, captured_results
from benchmarks.layer import Layer, Run, call_moe, gradient_inputs, run_experts, run_moe
from benchmarks.measure import sustained_ms
from benchmarks.peers import PEER
from benchmarks.shapes import Shape
from sonic.enums import KernelBackendMoE, ScoreOrder
from sonic.plan import RoutingPlan
from sonic.runtime.limits import MAX_SLOTS

ROUTINGS = ("top_k", "nr", "sr", "nr-s", "balance-f", "up", "down")
RANDOM = ("sr", "nr-s")
MODULE = " module"  # behind the name of a routing: the layer as a module that trains
_SEED = 7
PLAN_FIELDS = (
    "offset_by_expert",
    "token_by_row",
    "slot_by_row",
    "row_by_slot",
    "offset_by_token",
)
_REPEATS = 10  # of a routing pass in one CUDA graph


@dataclass(frozen=True)
class RoundedShape:
    """Size of a layer, and the tile q that its experts' counts are rounded to."""

    shape: Shape
    tile: int

    @classmethod
    def parse(cls, text: str) -> "RoundedShape":
        """Read ``T,H,I,E,top_k,q``; raises ``ValueError`` when it is not six positive integers, or
        more than any layer takes."""
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
        if rows > MAX_SLOTS:
            raise ValueError(f"q={rows} exceeds {MAX_SLOTS} in {text!r}")
        return cls(shape, rows)


# Sections of the paper's figure on token rounding: (T, H, I, top_k) and the numbers of experts.
_SWEEPS = (
    ((16384, 1536, 256, 8), (64, 128, 256, 512)),
    ((16384, 1536, 1024, 2), (16, 32, 64, 128)),
    ((16384, 4096, 512, 8), (64, 128, 256, 512)),
    ((16384, 4096, 1024, 4), (32, 64, 128, 256)),
)
SWEEPS = tuple(
    tuple(RoundedShape(Shape(T, H, inner, E, top_k), 128) for E in experts)
    for (T, H, inner, top_k), experts in _SWEEPS
)
# Where the layer is held against the fastest peer's.
BAR_SIZES = (
    RoundedShape(Shape(16384, 4096, 1024, 256, 4), 128),
    RoundedShape(Shape(16384, 1536, 1024, 128, 2), 128),
)


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
    """A routing of ``ROUTINGS`` on tile q, whose random rules draw the same numbers at every
    call."""

    name: str
    tile: int
    generator: torch.Generator

    @classmethod
    def make(cls, name: str, tile: int, device: torch.device) -> "Rounding":
        return cls(name, tile, torch.Generator(device=device))

    def seeded(self) -> torch.Generator | None:
        """For the rules that draw; None for the others."""
        return self.generator.manual_seed(_SEED) if self.name in RANDOM else None


def moe_forward(layer: Layer, rounding: Rounding) -> torch.Tensor:
    """Output (T,H): router GEMM, scores, rounding, plan and experts."""
    return _moe(layer, rounding)[0]


def _moe(layer: Layer, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {}
    if rounding.name != "top_k":
        options = {"rounding": rounding.name, "generator": rounding.seeded()}
    return call_moe(layer, tile=rounding.tile, **options)


def routing_forward(
    layer: Layer, rounding: Rounding, logits: torch.Tensor, in_module: bool
) -> tuple[torch.Tensor, ...]:
    """What lies between the router GEMM and the experts: scores, selection and plan, and
    ``in_module`` the balancing loss.

    Random rules draw from the default generator, which CUDA graphs know.
    """
    from sonic.plan import build_plan
    from sonic.routing import topk_routing
    from sonic.routing.rounded_routing import rounded_choices
    from sonic.routing.route import route
    from sonic.routing.switch_loss import switch_loss

    top_k, order = layer.shape.top_k, layer.options.score_order
    if rounding.name != "top_k":
        options = (rounding.tile, rounding.name)
        weights, _, load = rounded_choices(logits, top_k, *options, order=order)
        return (weights, switch_loss(logits, load, top_k)) if in_module else (weights,)
    if in_module:
        renormalize = order is not ScoreOrder.TOPK_OVER_SOFTMAX
        routed = route(logits, top_k, renormalize=renormalize, num_experts=layer.shape.E)
        return routed.scores, routed.switch
    weights, ids = topk_routing(logits, top_k, order=order)
    build_plan(ids, layer.shape.E)
    return (weights,)


def load_of(layer: Layer, rounding: Rounding) -> Load:
    """Waits for the device; not for timed regions."""
    with torch.no_grad():
        counts = _moe(layer, rounding)[2]
    tiles = (counts + rounding.tile - 1) // rounding.tile
    return Load(int(counts.sum()), int(tiles.sum()) * rounding.tile)


# --- ways to run the layer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A forward pass whose first output is (T,H), what its backward pass differentiates, by the
    name of the gradient, and the gradients of the outputs that it starts from."""

    forward: Callable[[], tuple[torch.Tensor, ...]]
    leaves: Mapping[str, torch.Tensor]
    grads: tuple[torch.Tensor, ...]

    def backward(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, tuple(self.leaves.values()), self.grads)


def function_way(layer: Layer, forward: Callable[[], torch.Tensor]) -> Way:
    """A function of the layer's own tensors, which has no loss."""
    leaves = gradient_inputs(layer, with_router=True)
    return Way(lambda: (forward(),), leaves, (layer.dout,))


def module_way(layer: Layer, rounding: Rounding) -> Way:
    """``sonic.MoE`` in training mode, of the layer's tensors, and the gradients of its output and
    balancing loss. Random rules draw from the default generator."""
    import sonic

    shape, options = layer.shape, layer.options
    routing = {"routing": "token_rounding", "rounding": rounding.name, "tile": rounding.tile}
    module = sonic.MoE(
        shape.E,
        shape.top_k,
        shape.H,
        shape.I,
        options.activation,
        options.add_bias,
        0.02,
        layout=options.layout,
        score_order=options.score_order,
        device="meta",
        dtype=options.dtype,
        **({} if rounding.name == "top_k" else routing),
    )
    leaves = gradient_inputs(layer, with_router=True)
    names = {"dw1": "c_fc.weight", "dw2": "c_proj.weight", "drouter_w": "router.weight"}
    names |= {"db1": "c_fc.bias", "db2": "c_proj.bias"}
    for gradient, leaf in leaves.items():
        if gradient in names:  # and not the input
            part, _, name = names[gradient].rpartition(".")
            leaves[gradient] = torch.nn.Parameter(leaf.detach())
            setattr(module.get_submodule(part), name, leaves[gradient])
    torch_only = options.impl == "reference"
    backend = KernelBackendMoE.torch if torch_only else KernelBackendMoE.sonicmoe
    grads = (layer.dout, torch.ones((), device=options.device))
    return Way(functools.partial(module, layer.x, backend), leaves, grads)


def ways_of(layer: Layer, roundings: Sequence[Rounding], with_module: bool) -> dict[str, Way]:
    """Each routing's layer by its name, and by that and ``MODULE`` the module."""
    ways = {}
    for rounding in roundings:
        forward = functools.partial(moe_forward, layer, rounding)
        ways[rounding.name] = function_way(layer, forward)
        if with_module:
            ways[rounding.name + MODULE] = module_way(layer, rounding)
    return ways


# --- check ----------------------------------------------------------------------------------------


class _RoundedStream(_Stream):
    """The streamed reference, given pairs as a table that is padded with the expert E."""

    def _logit_gradient(self, score_gradient: torch.Tensor) -> torch.Tensor:
        from sonic.routing.token_rounding import winners_of

        top_k = self.top_k
        with torch.enable_grad():
            leaf = self.layer.logits.detach().to(self.wide).requires_grad_()
            # Not topk, which takes any of equal logits: the derivative shows which.
            scale = leaf if self.over_all else leaf.gather(1, winners_of(leaf.detach(), top_k))
            scores = torch.exp(leaf - scale.logsumexp(dim=1, keepdim=True))
            padded = torch.nn.functional.pad(scores, (0, 1))
            scores = padded.gather(1, self.layer.topk_ids.long())
            (gradient,) = torch.autograd.grad(scores, leaf, score_gradient)
        return gradient

    def __init__(self, layer: Layer, runs: list[Run], top_k: int) -> None:
        super().__init__(layer, runs)
        self.top_k = top_k
        self.over_all = layer.options.score_order is ScoreOrder.TOPK_OVER_SOFTMAX


def check_rounded_layer(
    layer: Layer, rounding: Rounding, with_module: bool = False
) -> list[Finding]:
    """Pairs exactly, then output and every gradient against the streamed reference; with the
    module also its balancing loss and the gradients of that."""
    with exact_matmuls():
        module_runs, findings = [], []
        if with_module:
            way = module_way(layer, rounding)
            module_runs, findings = [_run_module(layer, way)], check_loss(layer, way)
        if rounding.name == "top_k":
            runs = [run_experts(layer), run_moe(layer), *module_runs]
            return [*check_layer(layer, runs), *findings]
        finding, pairs = check_pairs(layer, rounding)
        if not finding.passed:  # there may be no layer with such pairs
            return [finding]
        table, slot_of_pair = _as_table(layer, pairs)
        runs = [_run_flat(table, pairs, slot_of_pair), _run_moe(layer, rounding), *module_runs]
        with torch.no_grad():
            stream = _RoundedStream(table, runs, layer.shape.top_k)
            return [finding, *stream.findings(), *findings]


def check_pairs(
    layer: Layer, rounding: Rounding
) -> tuple[Finding, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The kept pairs as tokens, experts and weights; and whether they, and the plan, are exactly
    those that the torch implementation makes of the same scores."""
    from sonic.routing import rounded_routing, rounding_scores
    from sonic.routing.token_rounding import round_winners, winners_of

    top_k, order, tile = layer.shape.top_k, layer.options.score_order, rounding.tile
    with torch.no_grad():
        weights, plan = rounded_routing(
            layer.logits, top_k, tile, rounding.name, rounding.seeded(), order=order
        )
        scores = rounding_scores(layer.logits, top_k, order=order)
        winners = winners_of(layer.logits.to(scores.dtype), top_k)
        generator = rounding.seeded()
        uniform = torch.rand(layer.shape.E, device=scores.device, generator=generator)
        expected = round_winners(scores, winners, uniform, tile, rounding.name)
    same = torch.equal(weights, expected[0]) and all(
        torch.equal(getattr(plan, field), tensor)
        for field, tensor in zip(PLAN_FIELDS, expected[3:], strict=True)
    )
    counts = plan.expert_frequency()
    whole = bool(((counts % tile == 0) | (counts == layer.shape.T)).all())
    note = "must be equal, counts in whole tiles"
    finding = exact_finding("routing", "pairs", same and whole, note)
    return finding, _pairs_of(plan, weights)


def _pairs_of(
    plan: RoutingPlan, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, experts and weights of the pairs that rows serve, by slot."""
    live = plan.slot_by_row >= 0
    by_slot = plan.slot_by_row[live].argsort()
    experts = torch.arange(plan.num_experts, dtype=torch.int32, device=weights.device)
    experts = torch.repeat_interleave(experts, plan.expert_frequency().long())
    return plan.token_by_row[live][by_slot], experts[by_slot], weights[: by_slot.numel()]


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


def _run_module(layer: Layer, way: Way) -> Run:
    """The module without its loss, random rules with the numbers that :class:`Rounding` seeds."""
    torch.manual_seed(_SEED)
    out, _ = way.forward()
    gradients = torch.autograd.grad(out, tuple(way.leaves.values()), layer.dout)
    named = dict(zip(way.leaves, gradients, strict=True))
    return Run("module", {"out": out.detach()} | named, with_router=True)


def check_loss(layer: Layer, way: Way) -> list[Finding]:
    """The module's balancing loss, ``E / (top_k T^2) sum_e count_e sum_t softmax(logits_t)_e``, and
    its gradients, against fp64. The yardstick is fp32 with the logits' gradient rounded once."""
    from sonic.routing.token_rounding import winners_of

    shape, dtype = layer.shape, layer.options.dtype
    winners = winners_of(layer.logits.float(), shape.top_k)
    counts = torch.bincount(winners.flatten(), minlength=shape.E)
    paths = []
    for wide in (torch.float64, torch.float32):
        leaf = layer.logits.detach().to(wide).requires_grad_()
        shares = counts.to(wide) * (shape.E / (shape.top_k * shape.T**2))
        loss = (shares * leaf.softmax(dim=1).sum(dim=0)).sum()
        (dlogits,) = torch.autograd.grad(loss, leaf)
        if wide is torch.float32:
            dlogits = dlogits.to(dtype).float()
        x, weight = (t.detach().to(wide) for t in (layer.x, layer.router_weight))
        paths.append((loss.detach(), {"drouter_w": dlogits.t() @ x, "dx": dlogits @ weight}))
    (exact, gradients), (narrow, rounded) = paths
    _, loss = way.forward()
    findings = [finding_of("module", "loss", loss, exact, narrow)]
    leaves = [way.leaves[name] for name in gradients]
    found = torch.autograd.grad(loss, leaves)
    for (name, wanted), actual in zip(gradients.items(), found, strict=True):
        findings.append(finding_of("module loss", name, actual, wanted, rounded[name].to(dtype)))
    return findings


# --- times ----------------------------------------------------------------------------------------


def peer_forward(layer: Layer) -> torch.Tensor:
    """SonicMoE's layer of top-k, router included."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    out, *_ = moe_TC_softmax_topk_layer(
        layer.x,
        layer.router_weight,
        layer.w1.permute(1, 2, 0),
        None,
        layer.w2.permute(1, 2, 0),
        None,
        layer.shape.top_k,
        torch.cuda.current_stream().cuda_stream,
        ActivationType.SWIGLU,
    )
    return out


def check_peer(layer: Layer) -> list[Finding]:
    """SonicMoE's output and gradients against the streamed reference of our top-k layer."""
    leaves = gradient_inputs(layer, with_router=True)
    out = peer_forward(layer)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), layer.dout)
    tensors = {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))
    return check_runs(layer, [Run(PEER, tensors, True, PEER_ALLOWANCE)])


@dataclass(frozen=True)
class WayGraphs:
    """CUDA graphs of a way's forward pass and of that with its backward pass, and what their
    replays write: the outputs of one, the gradients of the other."""

    replays: tuple[Callable[[], None], ...]
    results: tuple[list[torch.Tensor], ...]

    @classmethod
    def of(cls, way: Way) -> "WayGraphs":
        forward = captured_results(way.forward)
        both = captured_results(lambda: way.backward(way.forward()))
        return cls(*zip(forward, both, strict=True))


def check_graphs(graphs: WayGraphs, way: Way, dtype: torch.dtype) -> list[Finding]:
    """Whether replays leave what the eager calls return, which were checked: the same kernels on
    the same inputs, so that no element may be further off than the last place of the largest one,
    by which sums of another order can differ."""
    for replay in graphs.replays:
        replay()
    outputs = way.forward()
    gradients = way.backward(outputs)
    names = [("out", "loss")[: len(outputs)], tuple(way.leaves)]
    findings = []
    for tensors, found, expected in zip(names, graphs.results, (outputs, gradients), strict=True):
        for name, left, right in zip(tensors, found, expected, strict=True):
            right = right.detach()
            allowed = torch.finfo(dtype).eps * right.abs().amax()
            same = bool(((left - right).abs() <= allowed).all())
            findings.append(exact_finding("graph", name, same, "must be as of the eager call"))
    return findings


def race_layers(
    ways: Mapping[str, Way], device: torch.device, seconds: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of the whole layer by way and pass, measured in turns."""

    def turn_of(way: Way) -> Callable[[_Clock], tuple]:
        def turn(clock: _Clock) -> tuple:
            start = clock.mark()
            outputs = way.forward()
            middle = clock.mark()
            way.backward(outputs)
            return start, middle, clock.mark()

        return turn

    turns = {name: turn_of(way) for name, way in ways.items()}
    medians = take_turns(turns, device, timed_seconds=seconds)
    passes = ("forward", "backward", "forward + backward")
    return {name: dict(zip(passes, times, strict=True)) for name, times in medians.items()}


def race_graphs(
    graphs: Mapping[str, WayGraphs], device: torch.device, seconds: float
) -> dict[str, dict[str, float]]:
    """:func:`race_layers` of CUDA graphs, whose replays wait for no host: the device's time."""

    def turn_of(own: WayGraphs) -> Callable[[_Clock], tuple]:
        def turn(clock: _Clock) -> tuple:
            marks = [clock.mark()]
            for replay in own.replays:
                replay()
                marks.append(clock.mark())
            return tuple(marks)

        return turn

    turns = {name: turn_of(own) for name, own in graphs.items()}
    medians = take_turns(turns, device, timed_seconds=seconds)
    return {
        name: {"forward": forward, "backward": both - forward, "forward + backward": both}
        for name, (forward, both, _) in medians.items()
    }


def routing_functions(
    layer: Layer, rounding: Rounding, in_module: bool
) -> dict[str, Callable[[], object]]:
    """Routing alone, between the router GEMM and the experts, forward and with backward."""
    logits = layer.logits.detach().requires_grad_()
    forward = functools.partial(routing_forward, layer, rounding, logits, in_module)
    with torch.no_grad():
        grads = [torch.ones_like(output) for output in forward()]

    def both() -> object:
        return torch.autograd.grad(forward(), logits, grads)

    return {"forward": forward, "forward + backward": both}


def routing_times(
    layer: Layer, rounding: Rounding, in_module: bool, seconds: float
) -> dict[str, float]:
    """Milliseconds of :func:`routing_functions` by pass, on a GPU without waiting for the host: in
    the layer the host is ahead, and a few small launches alone would time the host."""
    device = layer.options.device
    times = {}
    for name, function in routing_functions(layer, rounding, in_module).items():
        repeats = 1
        if device.type == "cuda":
            repeats = _REPEATS
            function = captured(function, repeats)
        times[name] = sustained_ms(function, device, timed_seconds=seconds) / repeats
    difference = times["forward + backward"] - times["forward"]
    # On a machine that others use, noise can exceed the difference: then there is no figure.
    return times | {"backward": difference if difference > 0 else math.nan}
