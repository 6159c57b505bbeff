"""The Hopper kernels on a GPU and in the emulator of tests/emulator, on the same inputs.

On a machine with a Hopper GPU, one file with every output (torch, numpy and sonic needed):

    python benchmarks/emulator_hardware.py --record hardware

Anywhere, the same problems in the emulator, compared with that file:

    python benchmarks/emulator_hardware.py --compare hardware --json result.json

Each case runs on exact inputs (small integers, powers of two: every sum is exact in float32 in any
order) and on normal ones. Both sides must lie in the bands of ``tests.gemm_bounds``, which ask
bitwise equality where arithmetic is exact and one rounding within float32's error elsewhere.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import sonic
from benchmarks.emulator_cases import Case, all_cases
from benchmarks.figures import EMULATOR, Row
from benchmarks.options import output_file, positive
from sonic.testing import poisoned_empty
from tests.gemm_bounds import Band, bands
from tests.grouped_gemms import EXACT, NORMAL, cast, digest, tiles

OUTPUTS = "outputs.npz"
HEAD = "head.json"
KINDS = (EXACT, NORMAL)
SMS = 2  # CTAs take several tiles in turn, so that every ring wraps
_SEEDS = 2  # of the emulator's scheduler, for each case and kind
Run = Callable[[Case, dict[str, Any]], dict[str, Tensor]]


def key_of(case: Case, kind: str, output: str) -> str:
    """Name of an output in a recording."""
    return f"{case.name}/{kind}/{output}"


def bits_of(tensor: Tensor) -> np.ndarray:
    """The bit patterns of a tensor, which numpy can store for every dtype."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(integer).numpy()


def run_on_gpu(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of a case, computed by this machine's GPU, on the CPU."""
    from sonic import stages

    with tiles(case.config, SMS), poisoned_empty():
        outputs = case.gemm.run(stages, cast(inputs, device="cuda"))
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def compile_case(case: Case) -> None:
    """Fills the kernel cache, in a process of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sonic.runtime.backend import load_backend
    from sonic.runtime.launch import kernel_for
    from sonic.runtime.problem import Arch

    kernel_for(load_backend(Arch.SM90), case.gemm.problem, case.config)


def compile_all(cases: list[Case], jobs: int) -> int:
    """Compiles every distinct kernel into the cache; returns their number."""
    distinct = {(case.gemm.problem, case.config): case for case in cases}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(compile_case, c) for c in distinct.values()]):
            future.result()
    return len(distinct)


def record(folder: Path, run: Run, head: dict[str, Any]) -> None:
    """Runs every case by ``run`` and writes its outputs' bits and what made them."""
    arrays, digests = {}, {}
    start = time.perf_counter()
    for case in all_cases():
        for kind in KINDS:
            inputs = case.gemm.inputs(case.seed, kind)
            digests[f"{case.name}/{kind}"] = digest(inputs)
            for name, tensor in run(case, inputs).items():
                arrays[key_of(case, kind, name)] = bits_of(tensor)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / OUTPUTS, **arrays)
    head = {**head, "run_seconds": round(time.perf_counter() - start, 1), "digests": digests}
    (folder / HEAD).write_text(json.dumps(head, indent=1) + "\n")
    size = (folder / OUTPUTS).stat().st_size
    print(f"{len(arrays)} outputs, {size / 1e6:.1f} MB in {folder}, {head['run_seconds']} s")


@dataclass(frozen=True)
class Comparison:
    """One output of one case, on the GPU and in the emulator.

    ``ulps``: largest distance, in steps of the output's dtype. ``outside``: elements that are not
    in their band. ``exact``: elements whose band is one number.
    """

    output: str
    dtype: str
    elements: int
    exact: int
    equal: int
    ulps: int
    outside_gpu: int
    outside_emulator: int

    @property
    def agrees(self) -> bool:
        return not (self.outside_gpu or self.outside_emulator)


def ordinals(tensor: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, neighbours differing by one."""
    bits = torch.from_numpy(bits_of(tensor)).long()
    least = -(2 ** (8 * tensor.element_size() - 1))
    return torch.where(bits < 0, least - bits, bits)


def compare_output(name: str, gpu: Tensor, emulator: Tensor, band: Band) -> Comparison:
    """One output of both sides, beside its band and each other."""
    # Partial sums that were added up in float64 have the steps of float32.
    dtype = torch.float32 if gpu.dtype is torch.float64 else gpu.dtype
    low, high = band.ends(dtype)
    distance = (ordinals(gpu.to(dtype)) - ordinals(emulator.to(dtype))).abs()
    return Comparison(
        name,
        str(dtype).removeprefix("torch."),
        gpu.numel(),
        int((low == high).sum()),
        int((distance == 0).sum()),
        int(distance.max()),
        band.outside(gpu),
        band.outside(emulator),
    )


class Recording:
    """What ``--record`` wrote."""

    def __init__(self, folder: Path):
        missing = [name for name in (OUTPUTS, HEAD) if not (folder / name).exists()]
        if missing:
            raise SystemExit(
                f"{folder} has no {' and no '.join(missing)}: make them on a machine with a Hopper "
                f"GPU with `python benchmarks/emulator_hardware.py --record {folder}`"
            )
        try:
            self.head = json.loads((folder / HEAD).read_text())
            self.arrays = np.load(folder / OUTPUTS)
            self.head["digests"]
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise SystemExit(
                f"{folder} holds no whole recording ({type(error).__name__}: {error}): "
                "record again into an empty directory"
            ) from None

    def outputs(self, case: Case, kind: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The recorded tensors, with the dtypes of ``like``."""
        return {
            name: torch.from_numpy(self.arrays[key_of(case, kind, name)]).view(tensor.dtype)
            for name, tensor in like.items()
        }

    def has(self, case: Case) -> bool:
        return f"{case.name}/{EXACT}" in self.head["digests"]

    def check_inputs(self, case: Case, kind: str, inputs: dict[str, Any]) -> None:
        here, there = digest(inputs), self.head["digests"].get(f"{case.name}/{kind}")
        if here != there:
            raise SystemExit(
                f"{case.name} on {kind} inputs: checksum {here} here, {there} in the recording. "
                "The cases have changed since; record them again."
            )


def run_in_emulator(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """The outputs of a case; Fault if the emulator finds anything."""
    from sonic import stages
    from tests.emulator.layer import emulated_layer

    with emulated_layer(seed=seed, sms=SMS, config=case.config), poisoned_empty():
        return case.gemm.run(stages, inputs)


def compare_case(recording: Recording, case: Case) -> dict[str, Any]:
    """The entry of one case in the result file."""
    start = time.perf_counter()
    entry: dict[str, Any] = {"case": case.name, "kernel": case.gemm.problem.name}
    entry |= {"tiles": case.config.name, "outputs": {}}
    for kind in KINDS:
        inputs = case.gemm.inputs(case.seed, kind)
        recording.check_inputs(case, kind, inputs)
        band = bands(case.gemm, inputs, kind, case.config)
        runs = [run_in_emulator(case, inputs, seed) for seed in range(_SEEDS)]
        first = runs[0]
        entry[f"{kind}_seeds_agree"] = all(
            np.array_equal(bits_of(run[n]), bits_of(first[n])) for run in runs for n in first
        )
        gpu = recording.outputs(case, kind, first)
        entry["outputs"][kind] = [
            asdict(compare_output(name, gpu[name], first[name], band[name])) for name in first
        ]
    entry["seconds"] = round(time.perf_counter() - start, 2)
    return entry


def agrees(entry: dict[str, Any]) -> bool:
    """Whether a case's outputs are all in their bands and do not depend on the emulator's seed."""
    outputs = [Comparison(**o) for kind in KINDS for o in entry["outputs"][kind]]
    return all(o.agrees for o in outputs) and all(entry[f"{kind}_seeds_agree"] for kind in KINDS)


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over all cases, by kind of input."""
    summary: dict[str, Any] = {
        "cases": len(entries),
        "cases_that_agree": sum(agrees(entry) for entry in entries),
        "kernels": len({(entry["kernel"], entry["tiles"]) for entry in entries}),
    }
    for kind in KINDS:
        outputs = [Comparison(**o) for entry in entries for o in entry["outputs"][kind]]
        elements = sum(o.elements for o in outputs)
        exact = [o for o in outputs if o.exact == o.elements]
        narrow = [o for o in outputs if o.dtype != "float32"]
        share = sum(o.equal for o in narrow) / sum(o.elements for o in narrow)
        summary[kind] = {
            "elements": elements,
            "share_bitwise_equal": round(sum(o.equal for o in outputs) / elements, 6),
            "share_bitwise_equal_of_16_bits": round(share, 6),
            "largest_difference_ulps": max(o.ulps for o in outputs),
            "outputs": len(outputs),
            "outputs_bitwise_equal": sum(o.equal == o.elements for o in outputs),
            "outputs_that_must_be_bitwise_equal": len(exact),
            "of_these_bitwise_equal": sum(o.equal == o.elements for o in exact),
            "outside_gpu": sum(o.outside_gpu for o in outputs),
            "outside_emulator": sum(o.outside_emulator for o in outputs),
        }
    return summary


def rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of `totals` that tables are made of, as rows of a result file."""
    exact, normal = summary[EXACT], summary[NORMAL]
    figures = [
        ("cases", summary["cases"], "tried"),
        ("agree", summary["cases_that_agree"], "cases"),
        ("kernels", summary["kernels"], "kernels"),
        ("exact/defined", exact["outputs_that_must_be_bitwise_equal"], "tried"),
        ("exact/bitwise equal", exact["of_these_bitwise_equal"], "outputs"),
        ("normal/bitwise equal", 100 * normal["share_bitwise_equal_of_16_bits"], "%"),
        ("normal/largest difference", normal["largest_difference_ulps"], "ulps"),
    ]
    return [
        asdict(Row(EMULATOR, [], f"hardware/{metric}", value, unit))
        for metric, value, unit in figures
    ]


def compare(folder: Path) -> dict[str, Any]:
    """The content of the result file."""
    recording = Recording(folder)
    entries = []
    cases = all_cases()
    known = [case for case in cases if recording.has(case)]
    if not known:
        raise SystemExit(f"{folder} has none of the {len(cases)} cases: record them again")
    if len(known) < len(cases):
        print(f"{len(cases) - len(known)} cases are not in the recording, which is older")
    for case in known:
        entry = compare_case(recording, case)
        entries.append(entry)
        print(f"{'ok ' if agrees(entry) else 'BAD'} {entry['seconds']:6.1f} s  {case.name}")
    recorded = {k: v for k, v in recording.head.items() if k != "digests"}
    summary = totals(entries)
    return {"rows": rows(summary), "totals": summary, "recorded": recorded, "cases": entries}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--record", type=Path, metavar="DIR", help="run on this machine's GPU")
    group.add_argument("--compare", type=Path, metavar="DIR", help="run in the emulator, compare")
    parser.add_argument("--json", type=output_file, help="result file of --compare")
    parser.add_argument(
        "-j", "--jobs", type=positive, default=os.cpu_count(), help="compilers at once"
    )
    arguments = parser.parse_args()

    from benchmarks.measure import environment

    if arguments.record:
        available = sonic.is_available()
        if not available.ok:
            raise SystemExit(f"--record needs a Hopper GPU: {available.reason}")
        start = time.perf_counter()
        kernels = compile_all(all_cases(), arguments.jobs)
        seconds = round(time.perf_counter() - start, 1)
        print(f"{kernels} kernels compiled in {seconds} s", flush=True)
        head = {**environment(torch.device("cuda")), "compile_seconds": seconds}
        record(arguments.record, run_on_gpu, head)
        return 0
    result = {**environment(torch.device("cpu")), **compare(arguments.compare)}
    print(json.dumps(result["totals"], indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    entries = result["cases"]
    return 0 if all(agrees(entry) for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())
