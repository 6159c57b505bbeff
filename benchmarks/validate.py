"""Everything the layer has to show, in one go, written to benchmarks/results/<date>-<name>.json.

    python benchmarks/validate.py --name layer --jobs 12

Parts (--parts, all by default):
    correctness  output and every gradient at the named shapes, both layouts, worst expert
    random       seeded random problems on poisoned memory between guard bands
    mutations    deliberate mistakes; each of them must be caught
    repeats      ten runs, bitwise equal
    memory       bytes saved for backward beside the formula
    speed        the speed table, every size checked again before it is timed

Problems run in worker processes: a crash or a hang is a recorded failure. The result file is
rewritten after every part. Exit status 1 if anything failed or did not get its turn.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.check import check_layer, findings_table, record_findings
from benchmarks.figures import RESULTS, Result, provider_of
from benchmarks.layer import LayerOptions, make_layer, run_experts
from benchmarks.measure import (
    environment,
    record_saved,
    record_speed,
    saved_bytes,
    speed_table,
)
from benchmarks.options import (
    EachOnce,
    missing_gpu,
    not_negative,
    output_file,
    positive,
    seconds,
)
from benchmarks.options import device as device_option
from benchmarks.shapes import NAMED_SHAPES, NamedShape, Shape, named_shape
from benchmarks.workers import Outcome, Pool, Task
from sonic.enums import ActivationType, GateUpLayout
from sonic.plan import RoutingPlan, build_plan
from sonic.testing import (
    GuardedAllocator,
    LayerInputs,
    LayerProblem,
    LayerResult,
    assert_layer_close,
    drop_plan_row,
    layer_references,
    make_inputs,
    omit_scores,
    random_problem,
    run_layer,
    shift_plan_offsets,
    swap_experts,
)

PARTS = ("correctness", "random", "mutations", "repeats", "memory", "speed")
REPEATS = 10
# Relative errors that other packages reach at these sizes (swiglu, no bias); ours stay at or below.
PEER_ERRORS = {"out": 0.0029, "dx": 0.0034, "dw1": 0.0030, "dw2": 0.0035, "dtopk_weights": 0.0026}
SMALL_TASK_BYTES = 2 * 2**30


def shape_options(named: NamedShape, layout: GateUpLayout, device: str, impl: str) -> LayerOptions:
    return LayerOptions(
        device=torch.device(device),
        activation=ActivationType(named.activation),
        layout=layout,
        add_bias=named.add_bias,
        impl=impl,
    )


# --- what runs in a worker: each returns {"ok": bool, "rows": [...], "text": str} ---------------


def correctness(argument: tuple[NamedShape, str, str, str]) -> dict[str, Any]:
    """Both regions of one shape against the streamed reference, and against the peers' figures."""
    named, layout, device, impl = argument
    layer = make_layer(named.shape, shape_options(named, GateUpLayout(layout), device, impl))
    findings = check_layer(layer)
    problem = named.shape.problem
    result = Result({}, provider=provider_of(impl))
    record_findings(result, problem, layout, findings)
    text, ok = findings_table(findings), all(finding.passed for finding in findings)
    if named.activation == "swiglu" and not named.add_bias:
        for finding in findings:
            peer = PEER_ERRORS.get(finding.tensor)
            if finding.run == "experts" and peer is not None:
                # The peers' figures are known to four decimals.
                below = round(finding.error, 4) <= peer
                metric = f"{layout}/{finding.run}/{finding.tensor}"
                result.add(metric, int(below), "at or below the peers' error", problem)
                if not below:
                    ok = ok and not named.model
                    text += f"\n{finding.tensor}: {finding.error:.6f}, above the peers' {peer}"
    return {"ok": ok, "rows": result.rows, "text": text}


def one_random_problem(argument: tuple[int, str, str]) -> dict[str, Any]:
    """The layer on random problem ``seed``, in memory that shows its misuse."""
    seed, device, impl = argument
    problem = random_problem(seed)
    inputs = make_inputs(problem, device)
    references = layer_references(problem, inputs)
    guard = GuardedAllocator()
    guarded = _guarded(inputs, guard)
    with guard.allocations():
        actual = run_layer(_experts(impl), problem, guarded)
    _synchronize(device)
    guard.check()
    assert_layer_close(actual, *references, problem)
    return {"ok": True, "rows": [], "text": problem.id}


def mutations(argument: tuple[int, str, str]) -> dict[str, Any]:
    """Each deliberate mistake in one problem must be noticed in every tensor that it affects."""
    seed, device, impl = argument
    problem = _plain_problem(seed)
    inputs = make_inputs(problem, device)
    references = layer_references(problem, inputs)
    assert_layer_close(run_layer(_experts(impl), problem, inputs), *references, problem)
    every = {field.name for field in fields(LayerResult) if _present(references[0], field.name)}
    # The score's gradient does not depend on the score, nor that of b2 on what experts compute.
    cases: dict[str, tuple[Callable[[], LayerResult], set[str]]] = {
        "zero output": (lambda: _zeros_like(references[1]), every),
        "experts swapped": (
            lambda: run_layer(_experts(impl), problem, _swapped(inputs)),
            every - {"db2"},
        ),
        "last row dropped": (
            lambda: run_layer(_planned_experts(impl, drop_plan_row), problem, inputs),
            every,
        ),
        "score omitted": (
            lambda: run_layer(_experts(impl), problem, _unscored(inputs)),
            every - {"dtopk_weights"},
        ),
        "offsets shifted": (
            lambda: run_layer(_planned_experts(impl, shift_plan_offsets), problem, inputs),
            every,
        ),
    }
    run, missed = 0, []
    for name, (mistake, expected) in cases.items():
        wrong = mistake()
        for field in sorted(expected):
            run += 1
            if _accepted(wrong, references, problem, field):
                missed.append(f"{name} is not noticed in {field}")
    text = f"{problem.id}: {run} mistakes, {len(missed)} unnoticed {missed or ''}".rstrip()
    return {"ok": not missed, "rows": [], "text": text, "run": run, "failed": len(missed)}


def repeats(argument: tuple[NamedShape, str, str]) -> dict[str, Any]:
    """Ten runs of one layer, while another stream keeps the memory busy, bitwise equal."""
    named, device, impl = argument
    layer = make_layer(named.shape, shape_options(named, GateUpLayout.INTERLEAVED, device, impl))
    first = run_experts(layer)
    different = []
    for _ in range(REPEATS - 1):
        _disturb(device)
        again = run_experts(layer)
        for name, tensor in again.tensors.items():
            expected = first.tensors[name]
            same = torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
            different += [] if same else [name]
        del again
    text = f"{named.letter}: {REPEATS} runs, different: {sorted(set(different)) or 'none'}"
    return {"ok": not different, "rows": [], "text": text, "run": REPEATS, "failed": len(different)}


def memory(argument: tuple[NamedShape, str, str]) -> dict[str, Any]:
    """Saved bytes of one shape: the formula, plus the index tensors that the package lists."""
    import sonic

    named, device, impl = argument
    shape = named.shape
    options = shape_options(named, GateUpLayout.INTERLEAVED, device, impl)
    layer = make_layer(shape, options)
    saved = saved_bytes(layer)
    listed = sonic.saved_bytes(
        shape.T,
        shape.H,
        shape.I,
        shape.E,
        shape.top_k,
        activation=options.activation,
        dtype=options.dtype,
    )
    result = Result({}, provider=provider_of(impl))
    record_saved(result, shape.problem, saved)
    result.add("saved bytes listed", listed, "B", shape.problem)
    ok = saved.total == listed and 0 <= saved.metadata
    text = f"{named.letter}: saved {saved.total}, formula {saved.formula}, listed {listed}"
    return {"ok": ok, "rows": result.rows, "text": text}


def speed(argument: tuple[NamedShape, str, str]) -> dict[str, Any]:
    """The speed table of one shape, after its check."""
    named, device, impl = argument
    layer = make_layer(named.shape, shape_options(named, GateUpLayout.INTERLEAVED, device, impl))
    findings = check_layer(layer)
    if not all(finding.passed for finding in findings):
        text = f"{findings_table(findings)}\n{named.letter}: wrong, so not timed"
        return {"ok": False, "rows": [], "text": text}
    figures, gemm_ms = speed_table(layer)
    result = Result({}, provider=provider_of(impl))
    record_speed(result, named.shape.problem, figures, gemm_ms)
    text = "\n".join(
        f"{named.letter} {line.region:8} {line.name:18} {line.ms:9.3f} ms "
        f"{line.tflops:6.1f} TFLOPS {line.percent:5.1f} % of bmm"
        for line in figures
    )
    return {"ok": True, "rows": result.rows, "text": text}


# --- pieces of the above -----------------------------------------------------------------------


def _experts(impl: str) -> Callable[..., torch.Tensor]:
    import sonic

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        b1: torch.Tensor | None,
        b2: torch.Tensor | None,
        activation: ActivationType,
        layout: GateUpLayout,
    ) -> torch.Tensor:
        return sonic.experts(
            x, ids, weights, w1, w2, b1=b1, b2=b2, activation=activation, layout=layout, impl=impl
        )

    return run


def _planned_experts(
    impl: str, change: Callable[[RoutingPlan], RoutingPlan]
) -> Callable[..., torch.Tensor]:
    """The layer on a plan that was tampered with, which the public functions do not allow."""
    import sonic.functional  # noqa: F401  (defines the operators)

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        b1: torch.Tensor | None,
        b2: torch.Tensor | None,
        activation: ActivationType,
        layout: GateUpLayout,
    ) -> torch.Tensor:
        chosen = "reference" if x.device.type == "cpu" or impl == "reference" else "cute"
        plan = change(build_plan(ids, w1.shape[0]))
        tensors = (plan.offset_by_expert, plan.token_by_row, plan.slot_by_row, plan.row_by_slot)
        how = (plan.top_k, activation.value, layout.value, chosen, True, None, None)
        operands = (x, w1, b1, w2, b2, weights.float().flatten())
        out, _ = torch.ops.sonic.experts_forward(*operands, *tensors, None, None, *how)
        return out

    return run


def _plain_problem(seed: int) -> LayerProblem:
    """A random problem on which every mistake has an effect: several experts, nothing dropped."""
    problem = random_problem(seed)
    return problem.with_changes(
        num_tokens=max(problem.num_tokens, 64),
        num_experts=max(problem.num_experts, 4),
        top_k=max(problem.top_k, 2),
        hidden_size=max(problem.hidden_size, 64),
        intermediate_size=max(problem.intermediate_size, 64),
        routing=type(problem.routing).UNIFORM,
        drop_fraction=0.0,
    )


def _present(result: LayerResult, field: str) -> bool:
    return getattr(result, field) is not None


def _zeros_like(result: LayerResult) -> LayerResult:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    zeros = {name: value if value is None else value * 0 for name, value in values.items()}
    return replace(result, **zeros)


def _swapped(inputs: LayerInputs) -> LayerInputs:
    swapped = {"w1": swap_experts(inputs.w1, 0, 1), "w2": swap_experts(inputs.w2, 0, 1)}
    if inputs.b1 is not None and inputs.b2 is not None:
        swapped |= {"b1": swap_experts(inputs.b1, 0, 1), "b2": swap_experts(inputs.b2, 0, 1)}
    return replace(inputs, **swapped)


def _unscored(inputs: LayerInputs) -> LayerInputs:
    return replace(inputs, topk_weights=omit_scores(inputs.topk_weights))


def _accepted(
    wrong: LayerResult,
    references: tuple[LayerResult, LayerResult],
    problem: LayerProblem,
    field: str,
) -> bool:
    """Whether ``field`` alone, everything else being right, gets past the comparison."""
    candidate = replace(references[1], **{field: getattr(wrong, field)})
    try:
        assert_layer_close(candidate, *references, problem)
    except AssertionError:
        return False
    return True


def _guarded(inputs: LayerInputs, guard: GuardedAllocator) -> LayerInputs:
    """Contiguous tensors between guard bands; the others already lie in poisoned larger ones."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    copies = {
        name: guard.copy_of(value, name)
        for name, value in values.items()
        if value is not None and value.is_contiguous()
    }
    return replace(inputs, **copies)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _disturb(device: str) -> None:
    """Work on another stream beside the next run: copies that compete for memory bandwidth."""
    if device.startswith("cuda"):
        with torch.cuda.stream(torch.cuda.Stream()):
            source = torch.empty(2**26, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            for _ in range(8):
                target.copy_(source)


# --- the run as a whole ------------------------------------------------------------------------


def make_tasks(arguments: argparse.Namespace, part: str) -> Iterator[Task]:
    device, impl = str(arguments.device), arguments.impl
    if part in ("random", "mutations"):
        function = one_random_problem if part == "random" else mutations
        count = arguments.problems if part == "random" else arguments.mutation_problems
        for seed in range(arguments.first_seed, arguments.first_seed + count):
            problem = random_problem(seed)
            affinity = f"{problem.activation.value} {problem.layout.value} {problem.dtype}"
            task = (seed, device, impl)
            yield Task(f"{part} {seed}", function, task, affinity, SMALL_TASK_BYTES)
        return
    for named in arguments.shapes:
        bytes_needed = _device_bytes(named)
        if part == "correctness":
            for layout in GateUpLayout:
                task = (named, layout.value, device, impl)
                name = f"correctness {named.letter} {layout.value}"
                yield Task(name, correctness, task, named.letter, bytes_needed)
        else:
            function = {"repeats": repeats, "memory": memory, "speed": speed}[part]
            task = (named, device, impl)
            yield Task(f"{part} {named.letter}", function, task, named.letter, bytes_needed)


def _device_bytes(named: NamedShape) -> int:
    """Weights, two sets of their gradients, the largest row buffers and the fp32 token tensors."""
    shape = named.shape
    weights = 2 * shape.E * shape.H * 3 * shape.I
    rows = 2 * shape.rows * (2 * shape.H + 6 * shape.I)
    return 3 * weights + rows + 40 * shape.T * shape.H + 2**30


class Log:
    """Counts, rows and failures of one part, told as they come."""

    def __init__(self, result: Result, part: str, total: int):
        self.result, self.part, self.total = result, part, total
        self.done = self.run = self.failed = 0
        self.start = time.monotonic()

    def __call__(self, outcome: Outcome) -> None:
        self.done += 1
        value = outcome.value
        ok = not outcome.error and value["ok"]
        self.run += value.get("run", 1)
        self.failed += value.get("failed", 1) if not ok else 0
        self.result.rows.extend(value.get("rows", []))
        if not ok and self.part in ("random", "mutations"):
            self.result.add(f"{self.part} failed", outcome.task.argument[0], "seed", [])
        elapsed = time.monotonic() - self.start
        verdict = "ok" if ok else "FAILED"
        head = f"[{elapsed:6.1f} s] {self.done}/{self.total} {outcome.task.name}: {verdict}"
        quiet = ok and self.part == "random"
        details = outcome.error or ("" if quiet else value.get("text", ""))
        separator = "\n" if "\n" in details else "  "
        print(f"{head} ({outcome.seconds:.1f} s){separator}{details}".rstrip(), flush=True)


def run_part(arguments: argparse.Namespace, pool: Pool, result: Result, part: str) -> bool:
    tasks = list(make_tasks(arguments, part))
    print(f"\n== {part}: {len(tasks)} tasks", flush=True)
    log = Log(result, part, len(tasks))
    # Nothing may compete with what is being timed.
    jobs = 1 if part == "speed" else None
    left = pool.run(tasks, arguments.limit, log, jobs)
    name = {"random": "random problems"}.get(part, part)
    for what, count in (("run", log.run), ("failed", log.failed), ("not started", left)):
        result.add(f"{name}/{what}", count, "count", [])
    print(f"== {part}: {log.run} run, {log.failed} failed, {left} tasks not started", flush=True)
    return log.failed == 0 and left == 0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", action=EachOnce, choices=PARTS, default=PARTS)
    parser.add_argument(
        "--shapes", nargs="+", action=EachOnce, type=_named, default=NAMED_SHAPES, metavar="SHAPE"
    )
    parser.add_argument("--problems", type=not_negative, default=600, help="random problems")
    parser.add_argument("--mutation_problems", type=not_negative, default=12)
    parser.add_argument("--first_seed", type=not_negative, default=0)
    parser.add_argument("--jobs", type=positive, default=8, help="worker processes")
    parser.add_argument("--limit", type=seconds, default=600, help="seconds for each part")
    parser.add_argument("--task_seconds", type=seconds, default=180, help="seconds for one task")
    parser.add_argument("--name", type=_name, default="validation", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory for result files")
    parser.add_argument("--device", type=device_option, default=torch.device("cuda"))
    parser.add_argument("--impl", choices=["auto", "cute", "reference"], default="auto")
    return parser.parse_args(argv)


def _named(text: str) -> NamedShape:
    """A letter, or five numbers for a size without one."""
    try:
        return NamedShape(text, "", Shape.parse(text)) if "," in text else named_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _name(text: str) -> str:
    """What can stand in the name of a file."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"expected a part of a file's name, got {text!r}")
    return text


def main(argv: list[str] | None = None) -> int:
    import sonic

    arguments = parse_arguments(argv)
    device = arguments.device
    available = sonic.is_available(device)
    if arguments.impl != "reference" and not available.ok:
        print(f"No kernels for {device}: {available.reason}")
        print("Pass --device cpu --impl reference --shapes T,H,I,E,K to try the script itself.")
        return 2
    missing = missing_gpu(device)
    if missing is not None:
        print(f"--device: {missing}")
        return 2
    if device.type == "cpu":
        big = [named.letter for named in arguments.shapes if named.model]
        parts = [part for part in arguments.parts if part not in ("random", "mutations")]
        if big and parts:
            print(f"The shapes {', '.join(big)} are too large for the reference on a CPU.")
            print("Pass --shapes with small sizes T,H,I,E,K, or --parts random mutations.")
            return 2
    # Every problem has one number of tokens. Workers inherit it.
    os.environ.setdefault("SONIC_COMPILE", "needed")
    result = Result(environment(device), provider=provider_of(arguments.impl))
    budget = 8 * 2**30
    if device.type == "cuda":
        budget = int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    path = arguments.output / f"{result.head['date']}-{arguments.name}.json"
    try:
        output_file(str(path))
    except argparse.ArgumentTypeError as error:
        print(f"--output: {error}")
        return 2
    print(f"{result.head['device']}, driver {result.head['driver']}, {result.head['versions']}")
    # Workers inherit this: without it each would start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    passed = True
    with Pool(arguments.jobs, budget, arguments.task_seconds) as pool:
        for part in arguments.parts:
            passed = run_part(arguments, pool, result, part) and passed
            result.write(path)
            print(f"wrote {path}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
