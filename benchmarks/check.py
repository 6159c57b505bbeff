"""Checks one layer at full size against a wide reference that is streamed expert by expert.

The reference is written here from the formulas, on purpose apart from ``sonic.reference``. Beside
it runs the same mathematics with the rounding points of a careful bf16 (fp16) implementation:
pre-activation, activation, expert output, output, ``dh``, scaled activation, ``dx`` rows and weight
gradients are each rounded once from a wide sum. The error of that narrow path is the yardstick: the
layer under test may have at most ``FACTOR`` times as much, as a whole, in its largest element, and
within every single expert.

Nothing of size (R, H) or (E, ...) is held for more than one expert, so that the largest models fit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.layer import Layer, Run, run_experts, run_moe
from benchmarks.report import ERROR_UNIT, NARROW, Result, text_table
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder

FACTOR = 2.0
WIDE_LIMIT = 2e10  # forward FLOPs up to which the reference is fp64
CHUNK_ROWS = 8192
FEW_ELEMENTS = 64  # below this many, an expert's own yardstick is too noisy to be used alone
SCORE_TOLERANCE = 1e-6  # eight units in the last place of fp32

ACTIVATIONS: dict[ActivationType, Callable[..., torch.Tensor]] = {
    ActivationType.SWIGLU: lambda g, u: u * F.silu(g),
    ActivationType.SWIGLU_OAI: lambda g, u: (
        (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))
    ),
    ActivationType.GEGLU: lambda g, u: u * F.gelu(g),
    ActivationType.GEGLU_TANH: lambda g, u: u * F.gelu(g, approximate="tanh"),
    ActivationType.REGLU: lambda g, u: u * F.relu(g),
    ActivationType.RELU_SQ: lambda x: F.relu(x).square(),
    ActivationType.RELU: F.relu,
    ActivationType.SILU: F.silu,
    ActivationType.GELU: F.gelu,
    ActivationType.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Finding:
    """Verdict on one tensor of one run.

    ``error`` and ``yardstick`` are relative L2 errors of the layer under test and of the narrow
    path. ``worst`` is the largest quotient of an error and what is allowed for it, over the whole
    tensor, its largest element and every expert; ``expert`` is the expert with the largest one.
    """

    run: str
    tensor: str
    passed: bool
    error: float
    yardstick: float
    worst: float
    expert: int | None = None
    note: str = ""


def findings_table(findings: Sequence[Finding]) -> str:
    """One line a tensor, the ones that failed marked."""
    header = ("run", "tensor", "error", "torch", "worst/allowed", "expert", "")
    rows = []
    for finding in findings:
        figures = (f"{finding.error:.3g}", f"{finding.yardstick:.3g}", f"{finding.worst:.2f}")
        expert = "" if finding.expert is None else str(finding.expert)
        verdict = finding.note if finding.passed else f"FAILED {finding.note}".rstrip()
        rows.append((finding.run, finding.tensor, *figures, expert, verdict))
    return text_table(header, rows)


def record_findings(
    result: Result, problem: list[int], layout: str, findings: Sequence[Finding]
) -> None:
    """Errors of both paths, the worst expert, and the verdict of each finding."""
    for finding in findings:
        metric = f"{layout}/{finding.run}/{finding.tensor}"
        result.add(metric, finding.error, ERROR_UNIT, problem)
        result.add(metric, finding.yardstick, ERROR_UNIT, problem, provider=NARROW)
        result.add(metric, finding.worst, "of what is allowed", problem)
        if finding.expert is not None:
            result.add(metric, finding.expert, "worst expert", problem)
        result.add(metric, int(finding.passed), "passed", problem)


def exact_finding(run: str, tensor: str, same: bool, note: str = "must be equal") -> Finding:
    """Of what is equal or wrong."""
    return Finding(run, tensor, same, 0.0 if same else math.inf, 0.0, 0.0, note=note)


def finding_of(
    run: str, tensor: str, actual: torch.Tensor, exact: torch.Tensor, narrow: torch.Tensor
) -> Finding:
    """Of a tensor or a number, in which no expert matters: its error as a whole and in its largest
    element against ``FACTOR`` times those of ``narrow``, and ``SCORE_TOLERANCE``, as the narrow
    error of fp32 may be next to nothing."""
    if not exact.numel():
        return Finding(run, tensor, True, 0.0, 0.0, 0.0, note="empty")
    errors = []
    for norm in (2, math.inf):
        size = torch.linalg.vector_norm(exact, norm).item()
        for path in (actual, narrow):
            distance = torch.linalg.vector_norm(path.detach().to(exact.dtype) - exact, norm)
            errors.append(_quotient(distance.item(), size))
    error, yardstick, peak, narrow_peak = errors
    worst = max(
        _quotient(error, FACTOR * yardstick + SCORE_TOLERANCE),
        _quotient(peak, FACTOR * narrow_peak + SCORE_TOLERANCE),
    )
    return Finding(run, tensor, worst <= 1.0, error, yardstick, worst)


class _ErrorSums:
    """Sums of squared errors of one tensor, as a whole and by expert, without a host sync."""

    def __init__(self, num_experts: int, device: torch.device):
        # Last row: the whole tensor. Columns: test, narrow, reference, number of elements.
        self.sums = torch.zeros(num_experts + 1, 4, dtype=torch.float64, device=device)
        self.largest = torch.zeros(2, dtype=torch.float64, device=device)

    def add(
        self,
        actual: torch.Tensor,
        reference: torch.Tensor,
        narrow: torch.Tensor,
        experts: Sequence[int],
    ) -> None:
        """Add elements to the rows ``experts``; -1 is the whole tensor."""
        test_error = actual.to(reference.dtype) - reference
        narrow_error = narrow.to(reference.dtype) - reference
        squares = [
            torch.linalg.vector_norm(values, dtype=torch.float64).square()
            for values in (test_error, narrow_error, reference)
        ]
        count = squares[0].new_full((), reference.numel())
        for expert in experts:
            self.sums[expert] += torch.stack([*squares, count])
        if -1 in experts and reference.numel():
            largest = torch.stack([test_error.abs().amax(), narrow_error.abs().amax()])
            self.largest = torch.maximum(self.largest, largest.double())

    def finding(self, run: str, tensor: str) -> Finding:
        test, narrow, reference, count = (
            column.tolist() for column in self.sums.cpu().unbind(dim=1)
        )
        if not count[-1]:
            return Finding(run, tensor, True, 0.0, 0.0, 0.0, note="empty")
        overall = math.sqrt(narrow[-1] / count[-1])
        quotients = []
        for expert, elements in enumerate(count[:-1]):
            if elements:
                yardstick = math.sqrt(narrow[expert] / elements)
                if elements < FEW_ELEMENTS:
                    yardstick = max(yardstick, overall)
                actual = math.sqrt(test[expert] / elements)
                quotients.append((_quotient(actual, _allowed(yardstick, elements)), expert))
        worst, expert = max(quotients, default=(0.0, None), key=lambda item: item[0])
        whole = _quotient(math.sqrt(test[-1] / count[-1]), _allowed(overall, count[-1]))
        largest_test, largest_narrow = self.largest.tolist()
        peak = _quotient(largest_test, _allowed(largest_narrow, count[-1]))
        worst = max(worst, whole, peak)
        norm = math.sqrt(reference[-1])
        return Finding(
            run,
            tensor,
            passed=worst <= 1.0,
            error=_quotient(math.sqrt(test[-1]), norm),
            yardstick=_quotient(math.sqrt(narrow[-1]), norm),
            worst=worst,
            expert=expert,
        )


def _allowed(yardstick: float, elements: float) -> float:
    # An error estimated from n samples scatters by about 1/sqrt(2n); three deviations of both.
    return FACTOR * yardstick * (1 + 3 / math.sqrt(elements))


def _quotient(numerator: float, denominator: float) -> float:
    """``numerator / denominator`` with 0/0 = 0, and infinity for anything that is not finite."""
    if not math.isfinite(numerator) or not math.isfinite(denominator):
        return math.inf
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """fp32 products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_layer(layer: Layer, runs: Sequence[Run] | None = None) -> list[Finding]:
    """Compare ``runs`` of ``layer`` (by default both kinds) with the streamed reference."""
    if runs is None:
        runs = (run_experts(layer), run_moe(layer))
    with exact_matmuls(), torch.no_grad():
        return [*_check_routing(layer, runs), *_Stream(layer, runs).findings()]


def _reference_scores(logits: torch.Tensor, ids: torch.Tensor, order: ScoreOrder) -> torch.Tensor:
    if order is ScoreOrder.SOFTMAX_OVER_TOPK:
        return logits.gather(1, ids).softmax(dim=1)
    scores = logits.softmax(dim=1).gather(1, ids)
    if order is ScoreOrder.TOPK_OVER_SOFTMAX_NORM:
        scores = scores / scores.sum(dim=1, keepdim=True)
    return scores


def _check_routing(layer: Layer, runs: Sequence[Run]) -> Iterator[Finding]:
    """Ids and scores of the router, and the logits and frequencies that the layer returned."""
    logits = layer.logits.double()
    ranked = logits.sort(dim=1, descending=True, stable=True).indices
    ids = ranked[:, : layer.shape.top_k]
    yield exact_finding("router", "topk_ids", torch.equal(ids, layer.topk_ids.long()))
    scores = _reference_scores(logits, ids, layer.options.score_order)
    error = (torch.linalg.vector_norm(layer.topk_weights.double() - scores)).item()
    error = _quotient(error, torch.linalg.vector_norm(scores).item())
    worst = error / SCORE_TOLERANCE
    yield Finding("router", "topk_weights", worst <= 1, error, SCORE_TOLERANCE / FACTOR, worst)
    counts = torch.bincount(ids.flatten(), minlength=layer.shape.E)
    for run in runs:
        if "logits" in run.tensors:  # a module keeps them to itself
            same = torch.equal(run.tensors["logits"], layer.logits)
            yield exact_finding(run.name, "router_logits", same)
            same = torch.equal(run.tensors["frequency"].long(), counts)
            yield exact_finding(run.name, "expert_frequency", same)


class _Stream:
    """The reference and the narrow path, one expert after the other."""

    def __init__(self, layer: Layer, runs: Sequence[Run]):
        self.layer, self.runs = layer, runs
        shape, options = layer.shape, layer.options
        self.device = layer.x.device
        small = shape.forward_flops(options.gated) <= WIDE_LIMIT
        self.wide = torch.float64 if small else torch.float32
        self.activation = ACTIVATIONS[options.activation]
        flat = layer.topk_ids.flatten().long()
        self.slots = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=shape.E)
        self.ends = counts.cumsum(0).tolist()
        rows = layer.w1.shape[1]
        # Row order that puts all gates before all ups, whatever the layout.
        self.w1_rows = torch.arange(rows, device=self.device)
        if options.gated and options.layout is GateUpLayout.INTERLEAVED:
            self.w1_rows = self.w1_rows.view(-1, 2).t().flatten()
        self.sums: dict[tuple[str, str], _ErrorSums] = {}
        tokens = {"out": layer.x.shape, "dx": layer.x.shape, "ds": layer.topk_ids.shape}
        self.reference = {name: self._zeros(*size) for name, size in tokens.items()}
        self.narrow = {name: self._zeros(*size) for name, size in tokens.items()}

    def _zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=self.wide, device=self.device)

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.layer.options.dtype).to(self.wide)

    def _parts(self, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pre.chunk(2, dim=-1) if self.layer.options.gated else (pre,)

    def _activate(
        self, pre: torch.Tensor, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Activation of ``pre`` (n,2I|I), and the gradient of ``pre`` for ``upstream`` (n,I)."""
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            post = self.activation(*self._parts(leaf))
            (gradient,) = torch.autograd.grad(post, leaf, upstream)
        return post.detach(), gradient

    def _compare(
        self,
        tensor: str,
        select: Callable[[torch.Tensor], torch.Tensor],
        reference: torch.Tensor,
        narrow: torch.Tensor,
        experts: Sequence[int],
        with_router: bool | None = None,
    ) -> None:
        for run in self.runs:
            wanted = with_router is None or run.with_router == with_router
            if wanted and tensor in run.tensors:
                key = (run.name, tensor)
                if key not in self.sums:
                    self.sums[key] = _ErrorSums(self.layer.shape.E, self.device)
                self.sums[key].add(select(run.tensors[tensor]), reference, narrow, experts)

    def findings(self) -> list[Finding]:
        for expert in range(self.layer.shape.E):
            self._expert(expert)
        self._tokens()
        return [sums.finding(*key) for key, sums in self.sums.items()]

    def _expert_slots(self, expert: int) -> torch.Tensor:
        return self.slots[self.ends[expert - 1] if expert else 0 : self.ends[expert]]

    def _expert(self, e: int) -> None:
        layer, wide = self.layer, self.wide
        w1 = layer.w1[e, self.w1_rows].to(wide)
        w2 = layer.w2[e].to(wide)
        b1 = self._zeros(w1.shape[0]) if layer.b1 is None else layer.b1[e, self.w1_rows].to(wide)
        b2 = self._zeros(w2.shape[0]) if layer.b2 is None else layer.b2[e].to(wide)
        sizes = {"dw1": w1.shape, "dw2": w2.shape, "db1": b1.shape, "db2": b2.shape}
        reference = {name: self._zeros(*size) for name, size in sizes.items()}
        narrow = {name: self._zeros(*size) for name, size in sizes.items()}
        for slots in self._expert_slots(e).split(CHUNK_ROWS):
            tokens = slots // layer.shape.top_k
            x, dy = layer.x[tokens].to(wide), layer.dout[tokens].to(wide)
            score = layer.topk_weights.flatten()[slots].to(wide).unsqueeze(1)
            h, p = x @ w1.t() + b1, dy @ w2
            # exact activation, and what each path hands on: h itself, or h rounded
            post, dh = self._activate(h, score * p)
            post_narrow, dh_narrow = self._activate(self._round(h), score * p)
            dh_narrow = self._round(dh_narrow)

            y = post @ w2.t() + b2
            y_narrow = self._round(self._round(post) @ w2.t() + b2)
            self.reference["out"].index_add_(0, tokens, score * y)
            self.narrow["out"].index_add_(0, tokens, score * y_narrow)
            self.reference["ds"].view(-1)[slots] = (dy * y).sum(1)
            self.narrow["ds"].view(-1)[slots] = (p * post_narrow).sum(1) + dy @ b2
            self.reference["dx"].index_add_(0, tokens, dh @ w1)
            self.narrow["dx"].index_add_(0, tokens, self._round(dh_narrow @ w1))

            reference["dw2"] += dy.t() @ (score * post)
            narrow["dw2"] += dy.t() @ self._round(score * post_narrow)
            reference["dw1"] += dh.t() @ x
            narrow["dw1"] += dh_narrow.t() @ x
            reference["db1"] += dh.sum(0)
            narrow["db1"] += dh_narrow.sum(0)
            for sums in (reference, narrow):
                sums["db2"] += (score * dy).sum(0)
        self._compare_expert(e, reference, narrow)

    def _compare_expert(
        self, e: int, reference: dict[str, torch.Tensor], narrow: dict[str, torch.Tensor]
    ) -> None:
        for name, expected in reference.items():
            rows = self.w1_rows if name in ("dw1", "db1") else slice(None)

            def select(actual: torch.Tensor, rows: torch.Tensor | slice = rows) -> torch.Tensor:
                return actual[e][rows]

            self._compare(name, select, expected, self._round(narrow[name]), (e, -1))

    def _tokens(self) -> None:
        """Compare what is indexed by token: output, ``dx``, score and router gradients."""
        layer = self.layer
        dlogits = self._logit_gradient(self.reference["ds"])
        dlogits_narrow = self._round(self._logit_gradient(self.narrow["ds"]))
        x, weight = layer.x.to(self.wide), layer.router_weight.to(self.wide)
        drouter, drouter_narrow = dlogits.t() @ x, self._round(dlogits_narrow.t() @ x)
        for e in range(layer.shape.E):
            rows = (drouter[e], drouter_narrow[e])
            self._compare("drouter_w", lambda actual, e=e: actual[e], *rows, (e, -1))
        del x, drouter, drouter_narrow

        out = (self.reference["out"], self._round(self.narrow["out"]))
        self._compare_tokens("out", *out)
        dx, dx_narrow = self.reference["dx"], self._round(self.narrow["dx"])
        self._compare_tokens("dx", dx, dx_narrow, with_router=False)
        dx += dlogits @ weight
        dx_narrow = self._round(dx_narrow + self._round(dlogits_narrow @ weight))
        self._compare_tokens("dx", dx, dx_narrow, with_router=True)

        flat = (self.reference["ds"].flatten(), self.narrow["ds"].flatten())
        for e in range(layer.shape.E):
            slots = self._expert_slots(e)
            expected = (flat[0][slots], flat[1][slots])
            self._compare(
                "dtopk_weights", lambda actual, s=slots: actual.flatten()[s], *expected, (e, -1)
            )

    def _compare_tokens(
        self,
        tensor: str,
        reference: torch.Tensor,
        narrow: torch.Tensor,
        with_router: bool | None = None,
    ) -> None:
        """The whole tensor, and for each expert the tokens that it worked on."""
        self._compare(tensor, lambda actual: actual, reference, narrow, (-1,), with_router)
        for e in range(self.layer.shape.E):
            tokens = self._expert_slots(e) // self.layer.shape.top_k
            expected = (reference[tokens], narrow[tokens])
            self._compare(tensor, lambda actual, t=tokens: actual[t], *expected, (e,), with_router)

    def _logit_gradient(self, score_gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = self.layer.logits.detach().to(self.wide).requires_grad_()
            ids = self.layer.topk_ids.long()
            scores = _reference_scores(leaf, ids, self.layer.options.score_order)
            (gradient,) = torch.autograd.grad(scores, leaf, score_gradient)
        return gradient
