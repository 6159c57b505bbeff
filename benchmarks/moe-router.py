"""Check and time the router after its matrix product, beside the same steps in torch's own kernels.

    python benchmarks/moe-router.py --json benchmarks/results/router.json

One call is everything between the logits and the experts: scores, top-k, plan, switch loss and
z-loss; backward is the gradient of the logits from weights and losses. Winners and plan of the two
are compared first; then weights, losses and gradient with fp64, from which they may be twice as far
as torch's, and a few units in the last place of fp32 more. After a failed check nothing is timed
and the exit status is 1. Times are of CUDA graph replays, so that neither side waits for the host,
by the protocol of ``benchmarks.measure``; backward is the difference of two of them. Launches are
those that torch's profiler sees.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.check import (
    Finding,
    exact_finding,
    finding_of,
    findings_table,
    record_findings,
)
from benchmarks.figures import EAGER, Result, text_table
from benchmarks.launches import captured, launches_of
from benchmarks.measure import environment, sustained_ms
from benchmarks.options import EachOnce, output_file
from benchmarks.options import named_shape as shape_option
from benchmarks.shapes import NamedShape, named_shape
from sonic.routing.route import route

SHAPES = tuple(named_shape(letter) for letter in ("A", "B", "C", "D2", "E", "F"))
DTYPES = {"BFloat16": torch.bfloat16, "Float32": torch.float32}
_REPEATS = 10  # of a pass in one CUDA graph
ROUTERS = ("softmax", "deepseek")  # top-k softmax; sigmoid with bias, 8 groups of which 4, scale
SCALE, GROUPS, TOPK_GROUPS = 2.5, 8, 4


class Passed(NamedTuple):
    """What either path hands on."""

    scores: Tensor
    ids: Tensor
    offset_by_expert: Tensor
    token_by_row: Tensor
    row_by_slot: Tensor
    switch: Tensor
    z: Tensor


RouterPath = Callable[[Tensor, int, Tensor | None], Passed]


def sonic_path(logits: Tensor, top_k: int, bias: Tensor | None) -> Passed:
    options = {}
    if bias is not None:
        groups = {"num_groups": GROUPS, "topk_groups": TOPK_GROUPS}
        options = {"score": "sigmoid", "bias": bias, "scale": SCALE, **groups}
    out = route(logits, top_k, num_experts=logits.shape[1], **options)
    plan = out.offset_by_expert, out.token_by_row, out.row_by_slot
    return Passed(out.scores, out.ids, *plan, out.switch, out.z)


def eager_path(
    logits: Tensor, top_k: int, bias: Tensor | None, ids: Tensor | None = None
) -> Passed:
    """The same in torch operations, as a model's author would write them; of fp64 logits in fp64,
    and with ``ids`` for these winners."""
    num_tokens, num_experts = logits.shape
    values = logits if logits.dtype == torch.float64 else logits.float()
    if bias is None:
        prob = torch.softmax(values, dim=-1)
        if ids is None:
            best, ids = torch.topk(prob, top_k, dim=-1)
        else:
            best = prob.gather(1, ids)
        scores = best / best.sum(dim=-1, keepdim=True)
    else:
        raw = torch.sigmoid(values)
        choice = (raw + bias).view(num_tokens, GROUPS, -1)
        rank = choice.topk(2, dim=-1).values.sum(dim=-1)
        chosen = rank.topk(TOPK_GROUPS, dim=-1).indices
        mask = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, chosen, True)
        choice = choice.masked_fill(~mask[..., None], -torch.inf).flatten(1)
        ids = choice.topk(top_k, dim=-1).indices if ids is None else ids
        scores = raw.gather(1, ids)
        scores = SCALE * scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        prob = raw / raw.sum(dim=-1, keepdim=True)
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    rows = torch.arange(flat.numel(), device=flat.device)
    row_by_slot = torch.empty_like(rows).scatter_(0, order, rows)
    load = torch.zeros(num_experts, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.float32)
    )
    offset = F.pad(load.cumsum(0), (1, 0)).int()
    shares = load.to(prob.dtype) / flat.numel()
    switch = num_experts * (shares * prob.mean(dim=0)).sum()
    z = torch.logsumexp(values, dim=-1).square().mean()
    return Passed(scores, ids.int(), offset, (order // top_k).int(), row_by_slot.int(), switch, z)


def distinct_values(count: int, device: str) -> Tensor:
    """(count,) numbers, all different in bfloat16: of equal logits several are right winners, and
    torch takes any of them."""
    return torch.linspace(-2, 2, count, device=device)


class Figures(NamedTuple):
    """One pass: milliseconds, launches, and microseconds by kernel."""

    ms: float
    launches: float
    kernels: dict[str, float]


class Case:
    """One shape and router: logits, and the graphs of both paths."""

    def __init__(
        self, named: NamedShape, router: str, dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        shape = named.shape
        self.label, self.router, self.problem = named.letter, router, shape.problem
        self.top_k = shape.top_k
        generator = torch.Generator(device).manual_seed(0)
        order = torch.rand(shape.T, shape.E, device=device, generator=generator).argsort(dim=1)
        self.logits = distinct_values(shape.E, device)[order].to(dtype).requires_grad_()
        self.bias = None
        if router == "deepseek":
            self.bias = 0.05 * torch.randn(shape.E, device=device, generator=generator)
        self.grad = torch.randn(shape.T, shape.top_k, device=device, generator=generator)

    def gradient(self, passed: Passed, logits: Tensor | None = None) -> Tensor:
        """Of the case's logits, or of those that ``passed`` was made of."""
        # Large enough for the losses' part to be seen beside that of the weights.
        for_loss = torch.full_like(passed.switch, len(self.logits))
        grads = self.grad.to(passed.scores.dtype), for_loss, for_loss
        outputs = passed.scores, passed.switch, passed.z
        return torch.autograd.grad(outputs, self.logits if logits is None else logits, grads)[0]

    def findings(self) -> list[Finding]:
        """How our path compares with torch's in winners and plan, and with fp64, for our winners,
        in all else."""
        ours = sonic_path(self.logits, self.top_k, self.bias)
        theirs = eager_path(self.logits, self.top_k, self.bias)
        wide = self.logits.detach().double().requires_grad_()
        exact = eager_path(wide, self.top_k, self.bias, ours.ids.long())
        same = (ours.ids == theirs.ids).all(dim=1)
        differ = f"{(~same).sum().item()} tokens differ"
        # Choices by fp32 score may be decided by the last bit.
        right = bool(same.all()) if self.bias is None else same.float().mean().item() >= 0.999
        findings = [exact_finding("router", "ids", right, differ)]
        if same.all():
            for name in ("offset_by_expert", "token_by_row", "row_by_slot"):
                equal = torch.equal(getattr(ours, name), getattr(theirs, name))
                findings.append(exact_finding("router", name, equal))
        three = ours, exact, theirs
        gradients = [
            self.gradient(passed, logits)
            for passed, logits in zip(three, (None, wide, None), strict=True)
        ]
        tensors = {
            "scores": [passed.scores[same] for passed in three],
            "switch": [passed.switch for passed in three],
            "z": [passed.z for passed in three],
            "dlogits": [gradient[same] for gradient in gradients],
        }
        for name, values in tensors.items():
            findings.append(finding_of("router", name, *(value.detach() for value in values)))
        return findings

    def passes(self, path: RouterPath) -> dict[str, Callable[[], object]]:
        """Forward, and forward with backward."""

        def forward() -> Passed:
            return path(self.logits, self.top_k, self.bias)

        return {"forward": forward, "forward + backward": lambda: self.gradient(forward())}

    def figures(self, path: RouterPath) -> dict[str, Figures]:
        """Forward and backward, the latter as what both take more than the former."""
        found = {}
        for name, function in self.passes(path).items():
            replay = captured(function, _REPEATS)
            ms = sustained_ms(replay, self.logits.device) / _REPEATS
            launches = launches_of(function)
            found[name] = Figures(ms, launches.total, launches.microseconds)
        forward, both = found["forward"], found["forward + backward"]
        backward = {
            kernel: us - forward.kernels.get(kernel, 0.0) for kernel, us in both.kernels.items()
        }
        return {
            "forward": forward,
            "backward": Figures(both.ms - forward.ms, both.launches - forward.launches, backward),
        }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", action=EachOnce, type=shape_option, default=SHAPES, metavar="SHAPE"
    )
    parser.add_argument("--routers", nargs="+", action=EachOnce, choices=ROUTERS, default=ROUTERS)
    parser.add_argument("--dtype", choices=DTYPES, default="BFloat16", help="of the logits")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel's time")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write a result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("Needs a CUDA GPU: the router's kernels run nowhere else.", file=sys.stderr)
        return 2
    result = Result(environment(torch.device("cuda")))
    lines = []
    for named in arguments.shapes:
        for router in arguments.routers:
            case = Case(named, router, DTYPES[arguments.dtype])
            findings = case.findings()
            record_findings(result, case.problem, router, findings)
            print(f"{named.letter} {router}\n{findings_table(findings)}\n")
            if not all(finding.passed for finding in findings):
                print(f"FAILED: {named.letter} {router}, so nothing was timed.", file=sys.stderr)
                return 1
            ours, theirs = case.figures(sonic_path), case.figures(eager_path)
            for name in ("forward", "backward"):
                metric = f"router {router}/{name}"
                for figures, provider in ((ours[name], ""), (theirs[name], EAGER)):
                    result.add(metric, figures.ms, "ms", case.problem, provider)
                    result.add(
                        f"{metric}/launches", figures.launches, "count", case.problem, provider
                    )
                cells = [f"{value:.4f}" for value in (ours[name].ms, theirs[name].ms)]
                ratio = f"{theirs[name].ms / ours[name].ms:.2f}"
                launches = [f"{side[name].launches:g}" for side in (ours, theirs)]
                lines.append([named.letter, router, name, *cells, ratio, *launches])
                if arguments.kernels:
                    print(f"{named.letter} {router} {name}")
                    for kernel, us in ours[name].kernels.items():
                        if us > 0.05:
                            print(f"  {us:8.1f} us  {kernel[:70]}")
    header = ["shape", "router", "pass", "sonic ms", "eager ms", "ratio", "launches", "eager's"]
    print(text_table(header, lines))
    if arguments.json:
        result.write(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
