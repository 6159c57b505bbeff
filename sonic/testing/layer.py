"""Running a candidate layer against the oracle: outputs and every gradient in one go."""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import experts_low_precision, experts_reference
from sonic.testing.compare import CloseReport, assert_close
from sonic.testing.problems import LayerInputs, LayerProblem


class Experts(Protocol):
    """A layer with the signature of :func:`sonic.reference.experts_reference`."""

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        activation: ActivationType,
        layout: GateUpLayout,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True)
class LayerResult:
    """Output of a layer and the gradient of each differentiable input; ``None`` without bias."""

    out: Tensor
    dhidden_states: Tensor
    dtopk_weights: Tensor
    dw1: Tensor
    dw2: Tensor
    db1: Tensor | None
    db2: Tensor | None


def run_layer(experts: Experts, problem: LayerProblem, inputs: LayerInputs) -> LayerResult:
    """Forward and backward of ``experts`` on ``inputs``, with ``inputs.dout`` as the gradient."""
    differentiable = {
        name: getattr(inputs, name).detach().requires_grad_()
        for name in ("hidden_states", "topk_weights", "w1", "w2", "b1", "b2")
        if getattr(inputs, name) is not None
    }
    out = experts(
        differentiable["hidden_states"],
        inputs.topk_ids,
        differentiable["topk_weights"],
        differentiable["w1"],
        differentiable["w2"],
        differentiable.get("b1"),
        differentiable.get("b2"),
        problem.activation,
        problem.layout,
    )
    gradients = torch.autograd.grad(out, list(differentiable.values()), inputs.dout)
    named = dict(zip(differentiable, gradients, strict=True))
    return LayerResult(
        out=out.detach(),
        dhidden_states=named["hidden_states"],
        dtopk_weights=named["topk_weights"],
        dw1=named["w1"],
        dw2=named["w2"],
        db1=named.get("b1"),
        db2=named.get("b2"),
    )


def layer_references(problem: LayerProblem, inputs: LayerInputs) -> tuple[LayerResult, LayerResult]:
    """``(ref64, ref_low)``: the float64 oracle, and the reference with the kernels' rounding."""
    ref64 = run_layer(experts_reference, problem, inputs.to(torch.float64))
    return ref64, run_layer(experts_low_precision, problem, inputs)


def assert_layer_close(
    actual: LayerResult,
    ref64: LayerResult,
    ref_low: LayerResult,
    problem: LayerProblem,
    *,
    factor: float = 2.0,
) -> dict[str, CloseReport]:
    """:func:`~sonic.testing.assert_close` on the output and each gradient.

    Returns:
        The reports by field. A field that the oracle says is zero (nothing was routed) is accepted
        only if it is zero.
    """
    live = bool(ref64.out.any())
    reports = {}
    for field in fields(LayerResult):
        tensors = [getattr(result, field.name) for result in (actual, ref64, ref_low)]
        if tensors[1] is None:
            continue
        is_score = field.name == "dtopk_weights"
        reports[field.name] = assert_close(
            *tensors,
            name=f"{field.name} of {problem.id}",
            factor=factor,
            # A score's gradient is a float32 sum over H of products of rounded numbers, the terms
            # being of order one and of either sign.
            band_dtype=problem.dtype if is_score else None,
            magnitude=problem.hidden_size**0.5 if is_score and live else 0.0,
            allow_zero_reference=not live,
        )
    return reports
