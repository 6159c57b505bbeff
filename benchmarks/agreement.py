"""Whether contenders of ``benchmarks.peers`` compute the layer that they are timed for.

Each pass that is timed is held to the streamed reference of ``benchmarks.check``: the output of
``inference``, the output of ``forward`` and every gradient of ``backward``; ours by the bounds of
our own rounding points, others by ``PEER_ALLOWANCE`` times these.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.check import Finding, check_runs, findings_table
from benchmarks.figures import ERROR_UNIT, Result
from benchmarks.layer import Layer, Run
from benchmarks.peers import FORWARD_ONLY, OURS, Contender, TorchGroupedMM, function_of

GRADIENTS = ("dx", "dw1", "dw2", "dtopk_weights")
INFERENCE, TRAINING = "inference", "training"  # what a pass is, behind the contender's name
# Errors of independent roundings add up by their squares: of one that rounds four times as often.
PEER_ALLOWANCE = 2.0
_ROOM = 4.0  # times a gradient that another contender's results and transients may take
_SEPARATOR = "/"

Findings = dict[str, list[Finding]]  # by contender


def allowance_of(name: str) -> float:
    return 1.0 if name == OURS else PEER_ALLOWANCE


def inference_run(name: str, out: torch.Tensor) -> Run:
    """What a contender's ``inference`` returned."""
    run = name + _SEPARATOR + INFERENCE
    return Run(run, {"out": out.detach()}, False, allowance_of(name))


def training_run(name: str, contender: Contender) -> Run:
    """One forward and backward pass of a contender."""
    out = contender.forward()
    gradients = dict(zip(GRADIENTS, contender.backward(out), strict=True))
    if isinstance(contender, TorchGroupedMM):
        gradients["dw1"] = contender.interleaved(gradients["dw1"])
    tensors = {"out": out.detach()} | {n: _kept(g.detach()) for n, g in gradients.items()}
    return Run(name + _SEPARATOR + TRAINING, tensors, False, allowance_of(name))


def _kept(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient of all experts' weights on the host, if the GPU may not hold those of another
    contender beside it."""
    if gradient.is_cuda and gradient.dim() == 3:
        free, _ = torch.cuda.mem_get_info(gradient.device)
        free += torch.cuda.memory_reserved(gradient.device)
        free -= torch.cuda.memory_allocated(gradient.device)
        if free < _ROOM * gradient.nbytes:
            return gradient.cpu()
    return gradient


def check_contenders(
    contenders: Mapping[str, Contender], layer: Layer, train: bool = True
) -> tuple[Findings, dict[str, str]]:
    """Findings of every contender that computes a layer, all passes or (``train`` false) inference
    alone; and of those that could not be checked, the reason."""
    runs: dict[str, list[Run]] = {}
    failures = {}
    for name, contender in contenders.items():
        if function_of(name, layer) is None:
            continue
        try:
            runs[name] = [inference_run(name, contender.inference())]
            if train and name not in FORWARD_ONLY:
                runs[name].append(training_run(name, contender))
        except Exception as error:  # most of all, memory that lasts for the others
            if name == OURS:
                raise
            runs.pop(name, None)
            line = (str(error).splitlines() or [""])[0]
            failures[name] = f"{type(error).__name__}: {line}"
    return findings_of(runs, layer), failures


def findings_of(runs: Mapping[str, Sequence[Run]], layer: Layer) -> Findings:
    """Findings of the ``runs`` by contender, each held to the function that it computes; one pass
    of the reference serves all that compute ``layer`` itself."""
    found: Findings = {name: [] for name in runs}
    own = [name for name in runs if function_of(name, layer) is layer]
    for names in filter(None, (own, *([name] for name in runs if name not in own))):
        reference = function_of(names[0], layer)
        assert reference is not None
        for finding in check_runs(reference, [run for name in names for run in runs[name]]):
            found[finding.run.partition(_SEPARATOR)[0]].append(finding)
    return found


def sound(found: Findings) -> list[str]:
    """The contenders of which everything passed."""
    return [name for name, own in found.items() if own and all(f.passed for f in own)]


def print_findings(found: Findings) -> None:
    """A line for each contender that passed, every finding of one that did not."""
    for name, own in found.items():
        if name not in sound(found):
            print(f"  {name} is WRONG and not timed:\n{findings_table(own)}")
            continue
        errors: dict[str, float] = {}
        for finding in own:
            what = f"{finding.run.partition(_SEPARATOR)[2]} {finding.tensor}"
            errors[what] = max(finding.error, errors.get(what, 0.0))
        cells = ", ".join(f"{what} {error:.4f}" for what, error in errors.items())
        worst = max(finding.worst for finding in own)
        print(f"  {name} is right: errors {cells}; at most {worst:.2f} of what is allowed")


def record_agreement(
    result: Result, prefix: str, problem: list[int], found: Findings, names: Iterable[str]
) -> None:
    """Rows ``<prefix>/<inference or training>/<tensor>``: the error, and how much of what is
    allowed was used."""
    for name in names:
        for finding in found.get(name, ()):
            metric = f"{prefix}/{finding.run.partition(_SEPARATOR)[2]}/{finding.tensor}"
            result.add(metric, finding.error, ERROR_UNIT, problem, name)
            result.add(metric, finding.worst, "of what is allowed", problem, name)
