"""Checks one layer at full size against a wide reference that is streamed expert by expert.

The reference is written here from the formulas, on purpose apart from ``sonic.reference``. Beside
it runs the same mathematics with the rounding points of a careful bf16 (fp16) implementation:
pre-activation, activation, expert output, output, ``dh``, scaled activation, ``dx`` rows and weight
gradients are each rounded once from a wide sum. The error of that narrow path is the yardstick: the
layer under test may have at most ``FACTOR`` times as much, as a whole, in its largest element,
within every single expert, and within every block of ``BLOCK`` rows and columns, which is smaller
than any tile of a kernel. Other packages round at points of their own and are allowed more, see
``Run.allowance``.

Nothing of size (R, H) or (E, ...) is held for more than one expert, so that the largest models fit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.figures import ERROR_UNIT, NARROW, Result, text_table
from benchmarks.layer import Layer, Run, run_experts, run_inference, run_moe
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder

FACTOR = 2.0
WIDE_LIMIT = 2e10  # forward FLOPs up to which the reference is fp64
CHUNK_ROWS = 8192
BLOCK = 64  # rows and columns, or BLOCK squared consecutive elements of a vector
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
    tensor, its largest element, every expert and every block; ``expert`` is the expert with the
    largest one.
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
    result: Result,
    problem: list[int],
    layout: str,
    findings: Sequence[Finding],
    provider: str = "",
) -> None:
    """Errors of both paths, the worst expert, and the verdict of each finding."""
    for finding in findings:
        metric = f"{layout}/{finding.run}/{finding.tensor}"
        result.add(metric, finding.error, ERROR_UNIT, problem, provider)
        result.add(metric, finding.yardstick, ERROR_UNIT, problem, provider=NARROW)
        result.add(metric, finding.worst, "of what is allowed", problem, provider)
        if finding.expert is not None:
            result.add(metric, finding.expert, "worst expert", problem, provider)
        result.add(metric, int(finding.passed), "passed", problem, provider)


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
    """Squared errors of one tensor, as a whole, by expert and by block, without a host sync."""

    def __init__(self, num_experts: int, device: torch.device, allowance: float):
        # Last row: the whole tensor. Columns: test, narrow, reference, number of elements.
        self.sums = torch.zeros(num_experts + 1, 4, dtype=torch.float64, device=device)
        self.largest = torch.zeros(2, dtype=torch.float64, device=device)
        self.block = torch.zeros((), dtype=torch.float64, device=device)  # its worst quotient
        self.allowance = allowance

    def add(
        self,
        actual: torch.Tensor,
        reference: torch.Tensor,
        narrow: torch.Tensor,
        experts: torch.Tensor | int,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Add elements to the whole and to ``experts``: to one, or row ``rows[i]`` (all rows by
        default) to ``experts[i]``, so that a row may count for several."""
        if not reference.numel():
            return
        test_error = actual.to(reference.device, reference.dtype) - reference
        narrow_error = narrow - reference
        by_row = torch.stack(
            [
                _row_vectors(values).square().sum(1, dtype=torch.float64)
                for values in (test_error, narrow_error, reference)
            ],
            dim=1,
        )
        elements = reference.numel() / by_row.shape[0]
        by_row = torch.cat((by_row, torch.full_like(by_row[:, :1], elements)), dim=1)
        self.sums[-1] += by_row.sum(0)
        if isinstance(experts, int):
            self.sums[experts] += by_row.sum(0)
        else:
            self.sums.index_add_(0, experts, by_row if rows is None else by_row[rows])
        largest = torch.stack([test_error.abs().amax(), narrow_error.abs().amax()])
        self.largest = torch.maximum(self.largest, largest.double())
        self.block = torch.maximum(self.block, _worst_block(test_error, narrow_error))

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
        worst = max(worst, whole, peak, _quotient(self.block.item(), 1.0)) / self.allowance
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


def _row_vectors(values: torch.Tensor) -> torch.Tensor:
    return values if values.dim() == 2 else values.unsqueeze(1)


def _worst_block(test_error: torch.Tensor, narrow_error: torch.Tensor) -> torch.Tensor:
    """The largest quotient of a block's error and what is allowed for it; infinite if a block's
    is not a number, or not zero where nothing is allowed."""
    count = _block_counts(test_error)
    test, narrow = (
        (_block_sums(error.square()).double() / count).sqrt()
        for error in (test_error, narrow_error)
    )
    overall = narrow_error.double().square().mean().sqrt()
    yardstick = torch.where(count < FEW_ELEMENTS, narrow.clamp_min(overall), narrow)
    quotients = torch.where(test == 0, torch.zeros_like(test), test / _allowed(yardstick, count))
    return torch.nan_to_num(quotients, nan=math.inf, posinf=math.inf).amax()


def _block_counts(values: torch.Tensor) -> torch.Tensor:
    """Elements of each block of :func:`_block_sums`."""
    if values.dim() == 1:
        starts = torch.arange(0, len(values), BLOCK**2, device=values.device)
        return (len(values) - starts).clamp_max(BLOCK**2).double().unsqueeze(1)
    rows, columns = (
        (size - torch.arange(0, size, BLOCK, device=values.device)).clamp_max(BLOCK).double()
        for size in values.shape
    )
    return rows.unsqueeze(1) * columns


def _block_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of a matrix, or of a vector taken as rows of ``BLOCK`` elements."""
    if values.dim() == 1:
        values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    rows, columns = values.shape
    if rows % BLOCK or columns % BLOCK:
        values = F.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return values.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK).sum((1, 3))


def _allowed(yardstick: Any, elements: Any) -> Any:
    """Of numbers, or element by element of tensors."""
    # An error estimated from n samples scatters by about 1/sqrt(2n); three deviations of both.
    return FACTOR * yardstick * (1 + 3 / elements**0.5)


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
    """Compare ``runs`` of ``layer`` (by default both kinds, and both without gradients) with the
    streamed reference."""
    if runs is None:
        runs = (run_experts(layer), run_moe(layer), *run_inference(layer))
    with exact_matmuls(), torch.no_grad():
        return [*_check_routing(layer, runs), *_Stream(layer, runs).findings()]


def check_runs(layer: Layer, runs: Sequence[Run]) -> list[Finding]:
    """Compare ``runs`` of ``layer`` with the streamed reference of its ids and weights, whichever
    router, or none, they are of."""
    with exact_matmuls(), torch.no_grad():
        return _Stream(layer, runs).findings()


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
        counts = torch.bincount(flat, minlength=shape.E)[: shape.E]
        self.ends = counts.cumsum(0).tolist()
        self.slots = flat.argsort(stable=True)[: self.ends[-1]]  # ids may be padded with E
        self.expert_by_row = flat[self.slots]
        self.trains = any(set(run.tensors) - {"out"} for run in runs)
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
        experts: torch.Tensor | int,
        rows: torch.Tensor | None = None,
        with_router: bool | None = None,
    ) -> None:
        for run in self.runs:
            wanted = with_router is None or run.with_router == with_router
            if wanted and tensor in run.tensors:
                key = (run.name, tensor)
                if key not in self.sums:
                    size = self.layer.shape.E, self.device, run.allowance
                    self.sums[key] = _ErrorSums(*size)
                self.sums[key].add(select(run.tensors[tensor]), reference, narrow, experts, rows)

    def findings(self) -> list[Finding]:
        for expert in range(self.layer.shape.E):
            if self.trains or self._expert_slots(expert).numel():
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
            h = x @ w1.t() + b1
            # exact activation, and what each path hands on: h itself, or h rounded
            p = dy @ w2 if self.trains else torch.zeros_like(h[:, : w2.shape[1]])
            post, dh = self._activate(h, score * p)
            post_narrow, dh_narrow = self._activate(self._round(h), score * p)
            dh_narrow = self._round(dh_narrow)

            y = post @ w2.t() + b2
            y_narrow = self._round(self._round(post) @ w2.t() + b2)
            self.reference["out"].index_add_(0, tokens, score * y)
            self.narrow["out"].index_add_(0, tokens, score * y_narrow)
            if not self.trains:
                continue
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
        if self.trains:
            self._compare_expert(e, reference, narrow)

    def _compare_expert(
        self, e: int, reference: dict[str, torch.Tensor], narrow: dict[str, torch.Tensor]
    ) -> None:
        for name, expected in reference.items():
            rows = self.w1_rows if name in ("dw1", "db1") else slice(None)

            def select(actual: torch.Tensor, rows: torch.Tensor | slice = rows) -> torch.Tensor:
                return actual[e].to(self.device)[rows]

            self._compare(name, select, expected, self._round(narrow[name]), e)

    def _tokens(self) -> None:
        """Compare what is indexed by token: output, ``dx``, score and router gradients."""
        layer = self.layer
        self._compare_tokens("out", self.reference["out"], self._round(self.narrow["out"]))
        if not self.trains:
            return
        dx, dx_narrow = self.reference["dx"], self._round(self.narrow["dx"])
        self._compare_tokens("dx", dx, dx_narrow, with_router=False)
        slots = self.slots
        flat = (self.reference["ds"].flatten()[slots], self.narrow["ds"].flatten()[slots])
        self._compare(
            "dtopk_weights", lambda actual: actual.flatten()[slots], *flat, self.expert_by_row
        )
        if not any(run.with_router for run in self.runs):
            return
        dlogits = self._logit_gradient(self.reference["ds"])
        dlogits_narrow = self._round(self._logit_gradient(self.narrow["ds"]))
        x, weight = layer.x.to(self.wide), layer.router_weight.to(self.wide)
        drouter, drouter_narrow = dlogits.t() @ x, self._round(dlogits_narrow.t() @ x)
        experts = torch.arange(layer.shape.E, device=self.device)
        self._compare("drouter_w", lambda actual: actual, drouter, drouter_narrow, experts)
        del x, drouter, drouter_narrow
        dx += dlogits @ weight
        dx_narrow = self._round(dx_narrow + self._round(dlogits_narrow @ weight))
        self._compare_tokens("dx", dx, dx_narrow, with_router=True)

    def _compare_tokens(
        self,
        tensor: str,
        reference: torch.Tensor,
        narrow: torch.Tensor,
        with_router: bool | None = None,
    ) -> None:
        """The whole tensor, and for each expert the tokens that it worked on."""
        tokens = self.slots // self.layer.shape.top_k
        self._compare(
            tensor,
            lambda actual: actual,
            reference,
            narrow,
            self.expert_by_row,
            tokens,
            with_router,
        )

    def _logit_gradient(self, score_gradient: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = self.layer.logits.detach().to(self.wide).requires_grad_()
            ids = self.layer.topk_ids.long()
            scores = _reference_scores(leaf, ids, self.layer.options.score_order)
            (gradient,) = torch.autograd.grad(scores, leaf, score_gradient)
        return gradient
