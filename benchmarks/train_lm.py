"""Train one small language model with token rounding and with top-k, and compare where they end.

    python benchmarks/train_lm.py --json benchmarks/results/lm.json
    python benchmarks/train_lm.py --plot benchmarks/results/lm.json benchmarks/results/lm.svg

A decoder of bytes reads the source files of Python's standard library. Every run sees the same
batches in the same order; runs of one routing differ in the seed of their initialisation only, and
say how far apart equal models end by chance. Validation text is in files of its own, and is always
routed by top-k, as token rounding is for training only. An expert receives four tiles of tokens on
average, as in the SonicMoE paper's experiments: with one, rounding would be a gross distortion.
Without a supported GPU a tiny model trains through the reference; its curves say nothing about the
full one.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonic
from benchmarks.figures import Result, provider_of, text_table
from benchmarks.measure import environment
from benchmarks.options import EachOnce, not_negative, output_file, positive
from benchmarks.rounding import ROUTINGS
from sonic import KernelBackendMoE, MoE

UNIT = "nats per byte"
VOCABULARY = 256
VALIDATION_SHARE = 20  # one file in so many is held out
AUX_LOSS = 0.01
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 100, 0.1
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Config:
    """Sizes of model and run. ``tile`` is that of token rounding."""

    layers: int = 4
    hidden: int = 384
    heads: int = 6
    intermediate: int = 256
    experts: int = 64
    top_k: int = 4
    length: int = 512
    sequences: int = 16
    tile: int | str = "auto"
    steps: int = 2000
    every: int = 200  # steps between two validations
    batches: int = 32  # of a validation

    @property
    def problem(self) -> list[int]:
        """T, H, I, E, top_k of one layer in one step."""
        tokens = self.length * self.sequences
        return [tokens, self.hidden, self.intermediate, self.experts, self.top_k]


TINY = Config(2, 32, 2, 16, 8, 2, 32, 8, tile=16, steps=30, every=10, batches=2)


# --- text -----------------------------------------------------------------------------------------


def standard_library() -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8: the interpreter's own library, by file name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" not in name and "dist-packages" not in name:
            held_out = zlib.crc32(name.encode()) % VALIDATION_SHARE == 0
            parts[held_out].append(path.read_bytes())
    train, validation = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts
    )
    return train, validation


def batches(text: Tensor, config: Config, count: int, seed: int, device: torch.device) -> Iterator:
    """``count`` batches (sequences, length + 1) from random places of the text, by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    text = text.to(device)
    reach = torch.arange(config.length + 1, device=device)
    for _ in range(count):
        limit = text.numel() - config.length
        starts = torch.randint(limit, (config.sequences, 1), generator=generator)
        yield text[starts.to(device, non_blocking=True) + reach].long()


# --- model ----------------------------------------------------------------------------------------


def turns_of(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width / 2) angles of the rotary embedding."""
    rates = ROTARY_BASE ** -torch.arange(0, 1, 2 / width, device=device)
    return torch.arange(length, device=device)[:, None] * rates


def rotated(heads: Tensor, turns: Tensor) -> Tensor:
    """(..., length, width) with its two halves as pairs turned by the angles of their position."""
    sine, cosine = turns.sin().to(heads.dtype), turns.cos().to(heads.dtype)
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


class Block(nn.Module):
    """Causal attention and a mixture of experts, each behind a norm and beside the stream."""

    def __init__(self, config: Config, routing: str) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.projection = nn.Linear(config.hidden, config.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(config.hidden)
        rounds = routing != "top_k"
        self.moe = MoE(
            config.experts,
            config.top_k,
            config.hidden,
            config.intermediate,
            "swiglu",
            False,
            config.hidden**-0.5,
            routing="token_rounding" if rounds else "top_k",
            rounding=routing if rounds else "nr",
            tile=config.tile,
        )

    def forward(
        self, stream: Tensor, turns: Tensor, backend: KernelBackendMoE
    ) -> tuple[Tensor, Tensor]:
        shape = (*stream.shape[:2], 3, self.heads, -1)
        qkv = self.qkv(self.attention_norm(stream)).view(shape)
        query, key, value = qkv.transpose(1, 3).unbind(dim=2)
        query, key = rotated(query, turns), rotated(key, turns)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.projection(mixed.transpose(1, 2).flatten(2))
        out, loss = self.moe(self.moe_norm(stream), backend)
        return stream + out, loss


class Model(nn.Module):
    """Bytes (B, n) to logits (B, n, 256) and the sum of the layers' balancing losses."""

    def __init__(self, config: Config, routing: str) -> None:
        super().__init__()
        self.width = config.hidden // config.heads
        self.tokens = nn.Embedding(VOCABULARY, config.hidden)
        self.blocks = nn.ModuleList(Block(config, routing) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, backend: KernelBackendMoE) -> tuple[Tensor, Tensor]:
        stream = self.tokens(ids)
        turns = turns_of(ids.shape[1], self.width, ids.device)
        total = stream.new_zeros(())
        for block in self.blocks:
            stream, loss = block(stream, turns, backend)
            total = total + loss
        return self.head(self.norm(stream)), total


# --- training -------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Losses of one run: of the training batches by step, and of the validation text."""

    routing: str
    seed: int
    training: list[float]
    validation: dict[int, float]

    @property
    def final(self) -> float:
        return self.validation[max(self.validation)]


def _loss(model: Model, batch: Tensor, backend: KernelBackendMoE) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next byte, and the balancing losses."""
    kind = batch.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        logits, balance = model(batch[:, :-1], backend)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), balance


def _validate(model: Model, text: Tensor, config: Config, backend: KernelBackendMoE) -> float:
    model.eval()
    device = model.head.weight.device
    with torch.no_grad():
        losses = [
            _loss(model, batch, backend)[0]
            for batch in batches(text, config, config.batches, 1, device)
        ]
    model.train()
    return float(torch.stack(losses).mean())


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a ramp, then half a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(
    config: Config, routing: str, seed: int, texts: tuple[Tensor, Tensor], device: torch.device
) -> Curve:
    """One run from scratch."""
    backend = KernelBackendMoE.sonicmoe if device.type == "cuda" else KernelBackendMoE.torch
    torch.manual_seed(seed)
    model = Model(config, routing).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=WEIGHT_DECAY,
        fused=device.type == "cuda",
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    losses, validation = [], {}
    for step, batch in enumerate(batches(texts[0], config, config.steps, 0, device)):
        loss, balance = _loss(model, batch, backend)
        (loss + AUX_LOSS * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            validation[step + 1] = _validate(model, texts[1], config, backend)
    return Curve(routing, seed, torch.stack(losses).tolist(), validation)


def train_all(
    config: Config,
    runs: Sequence[tuple[str, int]],
    texts: tuple[Tensor, Tensor],
    device: torch.device,
    jobs: int,
) -> Iterator[Curve]:
    """The curves of some (routing, seed), as they end; with ``jobs`` above 1 in processes that
    share the device."""
    if jobs == 1:
        for routing, seed in runs:
            yield train(config, routing, seed, texts, device)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(train, config, *run, texts, device) for run in runs]
        for done in as_completed(futures):
            yield done.result()


# --- results --------------------------------------------------------------------------------------


def record(result: Result, config: Config, curve: Curve) -> None:
    """Validation losses, and training losses averaged between two validations."""
    name = f"lm/{curve.routing}/seed {curve.seed}"
    before = 0
    for step, loss in curve.validation.items():
        part = curve.training[before:step]
        result.add(f"{name}/validation/step {step}", loss, UNIT, config.problem)
        result.add(f"{name}/training/step {step}", sum(part) / len(part), UNIT, config.problem)
        before = step


@dataclass(frozen=True)
class Summary:
    """Ends by routing and seed; ``between`` the largest distance of two routings' means, ``error``
    that distance's standard error (0 with one seed), ``within`` the largest distance of the ends of
    models that differ in their seed."""

    rows: list[list[str]]
    between: float
    error: float
    within: float


def summary(curves: Sequence[Curve]) -> Summary:
    """Where the routings end, and how far apart equal models do."""
    by_routing: dict[str, dict[int, float]] = {}
    for curve in curves:
        by_routing.setdefault(curve.routing, {})[curve.seed] = curve.final
    ends = {routing: [ends[seed] for seed in sorted(ends)] for routing, ends in by_routing.items()}
    rows = [
        [routing, *(f"{end:.4f}" for end in values), f"{statistics.fmean(values):.4f}"]
        for routing, values in ends.items()
    ]
    distances = [
        (abs(statistics.fmean(one) - statistics.fmean(other)), _error_of_mean(one, other))
        for one, other in combinations(ends.values(), 2)
    ]
    between, error = max(distances, default=(0.0, 0.0))
    within = max((max(values) - min(values) for values in ends.values()), default=0.0)
    return Summary(rows, between, error, within)


def _error_of_mean(*samples: list[float]) -> float:
    """Standard error of the difference of the samples' means."""
    parts = [statistics.variance(values) / len(values) for values in samples if len(values) > 1]
    return math.sqrt(sum(parts))


def read_curves(path: Path) -> dict[tuple[str, str, str], tuple[list[int], list[float]]]:
    """Steps and losses by (routing, seed, kind) of a result file."""
    curves: dict[tuple[str, str, str], tuple[list[int], list[float]]] = {}
    for row in Result.read(path).rows:
        parts = row.metric.split("/")
        if parts[0] == "lm" and len(parts) == 5 and row.value is not None:
            steps, losses = curves.setdefault((parts[1], parts[2], parts[3]), ([], []))
            steps.append(int(parts[4].removeprefix("step ")))
            losses.append(row.value)
    return curves


def plot(source: Path, target: Path) -> None:
    """Validation losses of a result file as a picture; needs matplotlib."""
    try:
        known = read_curves(source)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--plot takes a result file that --json wrote here: {error}") from None
    curves = {key: curve for key, curve in known.items() if key[2] == "validation"}
    if not curves:
        raise SystemExit(f"{source} has no curves of a language model.")
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"no picture: {error}; install matplotlib, or draw it elsewhere") from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "sonic", "font.size": 9}
    from matplotlib import pyplot

    routings = sorted({routing for routing, _, _ in curves})
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for (routing, seed, _), (steps, losses) in sorted(curves.items()):
        first = min(key for key in curves if key[0] == routing)
        axes.plot(
            steps,
            losses,
            color=f"C{routings.index(routing)}",
            linestyle="-" if (routing, seed, _) == first else "--",
            linewidth=1.2,
            label=f"{routing}, {seed}",
        )
    axes.set(xlabel="step", ylabel=f"validation loss, {UNIT}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--routings", nargs="+", action=EachOnce, choices=ROUTINGS, default=["top_k", "nr"]
    )
    parser.add_argument(
        "--seeds", nargs="+", action=EachOnce, type=not_negative, default=[0, 1, 2, 3]
    )
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once, a process each")
    parser.add_argument("--steps", type=positive, help="of each run")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write a result file")
    parser.add_argument(
        "--plot", type=Path, nargs=2, metavar=("JSON", "PICTURE"), help="draw a result file"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.plot:
        plot(*arguments.plot)
        return 0
    available = sonic.is_available()
    device = torch.device("cuda" if available.ok else "cpu")
    config = Config() if available.ok else TINY
    if not available.ok:
        print(f"No kernels for this machine: {available.reason}\nA tiny model by the reference.\n")
    if arguments.steps:
        every = max(1, arguments.steps // 10)
        config = replace(config, steps=arguments.steps, every=every)
    texts = standard_library()
    print(f"{texts[0].numel():,} bytes to train on, {texts[1].numel():,} held out", flush=True)
    provider = provider_of("auto" if available.ok else "reference")
    result = Result(environment(device), provider=provider)
    runs = [(routing, seed) for seed in arguments.seeds for routing in arguments.routings]
    curves = []
    start = time.perf_counter()
    for curve in train_all(config, runs, texts, device, arguments.jobs):
        curves.append(curve)
        record(result, config, curve)
        seconds = time.perf_counter() - start
        end = f"{curve.final:.4f} {UNIT}, after {seconds:.0f} s"
        print(f"{curve.routing}, seed {curve.seed}: {end}", flush=True)
        if arguments.json:
            result.write(arguments.json)
    curves.sort(key=lambda curve: runs.index((curve.routing, curve.seed)))
    found = summary(curves)
    seeds = [f"seed {seed}" for seed in sorted(arguments.seeds)]
    print(text_table(["routing", *seeds, "mean"], found.rows))
    print(
        f"largest distance of two means {found.between:.4f}, its standard error {found.error:.4f}; "
        f"largest distance of equal models' ends {found.within:.4f}"
    )
    for name, value in (
        ("distance of means", found.between),
        ("standard error of the distance", found.error),
        ("distance of seeds", found.within),
    ):
        result.add(f"lm/{name}", value, UNIT, config.problem)
    if arguments.json:
        result.write(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
