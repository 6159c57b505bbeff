"""Balancing of processes that share a batch, beside one process with the joined batch.

    torchrun --nproc-per-node 2 benchmarks/global_batch.py --json benchmarks/results/ranks.json

Every process routes its share of each micro-batch, shares that are not equal; then the first one
alone routes whole micro-batches through fresh routers. Global-batch losses and averaged gradients
must agree to rounding, and the correction bias bit for bit: inputs are multiples of small powers of
two, so that every logit is exact whatever the size of the product, and so are choices and counts.
On GPUs the exchange is NCCL's, elsewhere Gloo's. Exit status 1 if something differs.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.figures import Result, text_table
from benchmarks.measure import environment
from benchmarks.options import missing_gpu, output_file
from sonic.nn.routers import SigmoidRouter, SoftmaxRouter, update_balance

HIDDEN, EXPERTS, TOP_K = 256, 128, 8
STEPS, MICRO = 4, 3
TOKENS = 6144  # of a joined micro-batch
RATE = 0.01
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Outcome:
    """Losses (passes,), biases (steps, E), and the gradient of each router's weight."""

    losses: Tensor
    biases: Tensor
    grads: list[Tensor]


def shares(size: int) -> list[int]:
    """Tokens of each process, none like another's."""
    whole = sum(range(2, size + 2))
    parts = [TOKENS * (rank + 2) // whole for rank in range(size - 1)]
    return [*parts, TOKENS - sum(parts)]


def exact_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    """(steps, micro-batches, tokens, H) and (E, H) whose products are exact in float32."""
    generator = torch.Generator().manual_seed(1)
    size = (STEPS, MICRO, TOKENS, HIDDEN)
    data = torch.randint(-2, 3, size, generator=generator, dtype=torch.int8).to(device)
    weight = torch.randint(-512, 513, (EXPERTS, HIDDEN), generator=generator).to(device)
    # A product is a multiple of 2^-13 and at most 2^-3, the sum of 256 of them at most 2^5.
    return data.float() / 2, weight.float() / 2**12


def train(data: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Outcome:
    """All passes over ``data``, the biases after each step, gradients averaged over processes."""
    options = {"losses": {"global_batch": 1.0}, "group": group, "device": data.device}
    routers = torch.nn.ModuleList(
        [
            SigmoidRouter(HIDDEN, EXPERTS, TOP_K, **options),
            SoftmaxRouter(HIDDEN, EXPERTS, TOP_K, **options),
        ]
    )
    losses, biases = [], []
    for router in routers:
        with torch.no_grad():
            router.weight.copy_(weight)
    for step in data:
        for micro in step:
            for router in routers:
                loss = router(micro).aux_loss
                loss.backward()
                losses.append(loss.detach())
        update_balance(routers, RATE)
        biases.append(routers[0].correction_bias.clone())
    grads = [router.weight.grad for router in routers]
    if group is not None:
        for grad in grads:
            dist.all_reduce(grad, group=group)
            grad /= dist.get_world_size(group)
    return Outcome(torch.stack(losses), torch.stack(biases), grads)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def compare(shared: Outcome, alone: Outcome) -> dict[str, tuple[float, float, str]]:
    """Each figure with what it may be at most, and its unit."""
    errors = {
        "loss": relative(shared.losses, alone.losses),
        "sigmoid router's gradient": relative(shared.grads[0], alone.grads[0]),
        "softmax router's gradient": relative(shared.grads[1], alone.grads[1]),
    }
    figures = {name: (error, TOLERANCE, "relative L2") for name, error in errors.items()}
    if not alone.biases.any(dim=1).all():
        raise RuntimeError("the bias did not move: the comparison would say nothing")
    differing = int((shared.biases != alone.biases).sum())
    return figures | {"entries of the bias that differ": (differing, 0, "count")}


def agreed(outcome: Outcome) -> bool:
    """Whether every process holds the same losses and biases, to the bit."""
    mine = torch.cat([outcome.losses.flatten(), outcome.biases.flatten()]).double()
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return torch.equal(low, high)


def report(figures: dict[str, tuple[float, float, str]], equal: bool, path: Path | None) -> bool:
    """Print and write the figures of the first process; whether all of them are in order."""
    size, backend = dist.get_world_size(), dist.get_backend()
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    result = Result(environment(device))
    problem = [TOKENS, HIDDEN, 0, EXPERTS, TOP_K]
    metric = f"global batch/{size} processes/{backend}"
    for name, (value, _, unit) in figures.items():
        result.add(f"{metric}/{name}", value, unit, problem)
    result.add(f"{metric}/processes agree", float(equal), "count", problem)
    rows = [
        [name, unit, f"{value:.3g}", f"{most:g}"] for name, (value, most, unit) in figures.items()
    ]
    print(f"{size} processes, {backend}, {shares(size)} of {TOKENS} tokens")
    print(text_table(["figure", "unit", "value", "at most"], rows))
    print(f"processes hold the same bits: {equal}")
    if path is not None:
        result.write(path)
    return equal and all(value <= most for value, most, _ in figures.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write a result file")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        raise SystemExit("Start it with torchrun: torchrun --nproc-per-node 2 " + __file__)
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        missing = missing_gpu(device)
        if missing is not None:
            parser.error(f"--device cuda, one for each process: {missing}")
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        data, weight = exact_inputs(device)
        parts = shares(size)
        first = sum(parts[:rank])
        own = data[:, :, first : first + parts[rank]]
        shared = train(own, weight, dist.group.WORLD)
        equal = agreed(shared)
        passed = True
        if rank == 0:
            passed = report(compare(shared, train(data, weight, None)), equal, arguments.json)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
