"""How soon a process that starts with filled caches has run its first forward and backward pass.

    python benchmarks/cold_start.py --json benchmarks/results/<date>-cold-start.json

One process after another runs one layer twice: the first of them fills caches (of sonic, of Triton
and of Python) of this run's own, the others find what it left. Each reports

* ``import torch``: before sonic, with the CUDA context and the inputs, which every program needs;
* ``import sonic``: the import, and that of what a layer needs of it;
* ``first``: from there to the end, on the device, of the first forward and backward pass;
* ``start``: the last two together, the figure that the package answers for;
* ``process``: all of them, from the interpreter's first line;
* ``second``: another forward and backward pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_START = time.perf_counter()  # of a child process
_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

PHASES = ("import torch", "import sonic", "first", "start", "process", "second")
_LIMIT_SECONDS = 300
_CHILD = "--child"  # then device and size: a process that is timed


def child(sizes: list[int], kind: str) -> None:
    """Run the layer and print the seconds of each phase, as JSON, on a line of their own."""
    import torch

    device, (tokens, hidden, width, experts, top_k) = torch.device(kind), sizes
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def wait() -> float:
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    x, dout = normal(tokens, hidden).requires_grad_(), normal(tokens, hidden)
    w1 = (normal(experts, 2 * width, hidden) * hidden**-0.5).requires_grad_()
    w2 = (normal(experts, hidden, width) * width**-0.5).requires_grad_()
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=device).requires_grad_()
    ready = wait()

    import sonic

    experts_of = sonic.experts
    imported = time.perf_counter()

    def both() -> float:
        loss = (experts_of(x, ids, weights, w1, w2) * dout).sum()
        torch.autograd.grad(loss, (x, weights, w1, w2))
        return wait()

    first = both()
    seconds = (
        ready - _START,
        imported - ready,
        first - imported,
        first - ready,
        first - _START,
        both() - first,
    )
    print(json.dumps(dict(zip(PHASES, seconds, strict=True))))


def start_process(sizes: list[int], kind: str, caches: Path) -> dict[str, float]:
    """The seconds of one process that uses the caches in this folder."""
    environment = {
        **{n: value for n, value in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"},
        "SONIC_CACHE_DIR": str(caches / "sonic"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTHONPYCACHEPREFIX": str(caches / "python"),
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, _CHILD, kind, *map(str, sizes)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS
    )
    if done.returncode != 0:
        raise SystemExit(f"The process failed: {' '.join(command)}\n{done.stderr}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [_CHILD]:  # before anything is imported that takes time
        child([int(size) for size in argv[2:]], argv[1])
        return

    import torch

    from benchmarks.figures import Result, text_table
    from benchmarks.measure import environment
    from benchmarks.options import THIEK, THIEK_HELP, output_file, positive
    from benchmarks.options import shape as shape_option
    from benchmarks.shapes import Shape

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Shape(32768, 2048, 768, 128, 8)
    parser.add_argument(
        "--thiek", type=shape_option, default=default, metavar=THIEK, help=THIEK_HELP
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=positive, default=5, help="that find filled caches")
    parser.add_argument("--caches", type=Path, metavar="FOLDER", help="to use, and keep")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.caches is not None and arguments.caches.exists() and not arguments.caches.is_dir():
        parser.error(f"--caches {arguments.caches} is no folder")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("Needs a CUDA GPU, or --device cpu for the reference.", file=sys.stderr)
        sys.exit(2)
    problem = arguments.thiek.problem
    result = Result(environment(torch.device(arguments.device)))
    with tempfile.TemporaryDirectory() as folder:
        caches = (arguments.caches or Path(folder)).absolute()
        first = start_process(problem, arguments.device, caches)
        later = [
            start_process(problem, arguments.device, caches) for _ in range(arguments.processes)
        ]
    rows = []
    for phase in PHASES:
        values = [seconds[phase] for seconds in later]
        middle = statistics.median(values)
        result.add(f"cold start/{phase}", middle, "s", problem)
        result.add(f"cold start/{phase}, slowest", max(values), "s", problem)
        result.add(f"cold start/{phase}, first process", first[phase], "s", problem)
        rows.append([phase, "", f"{first[phase]:.3f}", f"{middle:.3f}", f"{max(values):.3f}"])
    header = ("phase", "seconds:", "first process", "later, median", "later, slowest")
    print(text_table(header, rows), flush=True)
    if arguments.json:
        result.write(arguments.json)


if __name__ == "__main__":
    main()
