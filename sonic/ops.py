"""The torch.library operators of sonic: schemas, shape functions and dispatch to the stages.

Imports torch and, of this package, its enums, errors, sizes and orders of rows only. The stages
themselves (``sonic.reference.stages`` in torch, ``sonic.stages`` on CuTe and Triton kernels) are
loaded when an operator first runs with that ``impl``, so the schemas exist before Dynamo traces and
the reference works with neither Triton nor CUTLASS installed.

Every operator runs on the current stream, reads no device value on the host, allocates only what
the static shapes say, and is deterministic. Formulas for the gradients are in ``sonic.autograd``.

Symbols: T tokens, H hidden size, I intermediate size, E experts, R routed rows (static upper bound,
the number of slots), slot: index into the flat (T * top_k) list of token-expert pairs. Scores are
contiguous, of one element a slot and any shape, which is that of their gradient.

The seven plan arguments of the experts operators are the fields of :class:`sonic.plan.RoutingPlan`.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime.columns import column_slices
from sonic.runtime.eager import current_device
from sonic.runtime.errors import ArgumentError, LayoutError
from sonic.runtime.layout import packed_to_rows
from sonic.runtime.limits import message

LIBRARY = torch.library.Library("sonic", "DEF")


def _define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_PLAN = (
    "Tensor offset_by_expert, Tensor token_by_row, Tensor slot_by_row, Tensor row_by_slot, "
    "Tensor? offset_by_token, Tensor? slot_by_position, SymInt top_k"
)
_HOW = "str activation, str layout, str impl"
_BACKWARD_IN = (
    "Tensor dout, Tensor? x, Tensor w1, Tensor w2, Tensor? b2, Tensor h, Tensor scores, "
    f"{_PLAN}, {_HOW}, bool[] needs"
)
_BACKWARD_OUT = "(Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dscores)"

# The main gradients are only carried here, for the backward operator to accumulate into.
_define(
    "experts_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor scores, "
    f"{_PLAN}, {_HOW}, bool store_preact, Tensor? w1_main_grad, Tensor? w2_main_grad)"
    " -> (Tensor out, Tensor h)"
)
_define(f"experts_backward({_BACKWARD_IN}) -> {_BACKWARD_OUT}")
_define(
    f"experts_backward_accumulate({_BACKWARD_IN}, Tensor(a!)? w1_main_grad,"
    f" Tensor(b!)? w2_main_grad) -> {_BACKWARD_OUT}"
)
_define(
    "grouped_mm(Tensor rows, Tensor weight, Tensor? bias, Tensor offset_by_expert, str impl)"
    " -> Tensor"
)
_define(
    "grouped_mm_backward(Tensor dout, Tensor? rows, Tensor weight, Tensor offset_by_expert,"
    " str impl, bool[] needs) -> (Tensor drows, Tensor dweight, Tensor dbias)"
)

# Of x, w1, b1, w2, b2 and the scores.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
SomeGradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
_HERE = nullcontext()  # most layers are on the current device, and entering it takes time
_ACTIVATIONS = {activation.value: activation for activation in ActivationType}
_LAYOUTS = {layout.value: layout for layout in GateUpLayout}


# ------------------------------------------------------------------------------- dispatch


@functools.cache
def _load_stages(impl: str, device: torch.device) -> ModuleType:
    if impl == "reference":
        from sonic.reference import stages as reference_stages

        return reference_stages
    from sonic.runtime.backend import backend_for

    backend_for(device)  # raises, with the remedy, where no kernel package serves this device
    from sonic import stages as kernel_stages

    return kernel_stages


def _region(x: Tensor, impl: str) -> AbstractContextManager[Any]:
    """Where the stages run: on the GPU of ``x``, and outside of any autocast region.

    The stages own their dtypes, so an enclosing region must not reach the reference's matmuls.
    """
    if impl == "cute":
        index = x.get_device()
        return _HERE if index == current_device() else torch.cuda.device(index)
    kind = x.device.type
    if kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind):
        return torch.autocast(x.device.type, enabled=False)
    return _HERE


def _impl(name: str) -> Any:
    """Register the decorated function as CPU and CUDA kernel of operator ``name``."""

    def register(function: Any) -> Any:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        return function

    return register


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"sonic::{name}", lib=LIBRARY)


def require_aligned(impl: str, **weights: Tensor | None) -> None:
    """Raise LayoutError if a weight that the kernels would read does not start at 16 bytes.

    Weights are too large to be packed at every call; biases are read element by element and need
    not be aligned. Addresses are known only when an operator runs, not while it is traced, so this
    is not among ``sonic.checks``.
    """
    if impl != "cute":
        return
    for name, weight in weights.items():
        if weight is not None and weight.data_ptr() & 15:
            raise LayoutError(
                f"sonic: {name} starts {weight.data_ptr() % 16} bytes past a 16-byte boundary. "
                'Allowed: addresses that are multiples of 16 bytes with impl="cute". Give it '
                f"memory of its own, {name}.clone(), or align its slice of the flat buffer."
            )


def _rows_16b(x: Tensor) -> Tensor:
    """``x`` (rows, columns) itself if the kernels can address it, else a packed copy.

    The kernels read rows in 16-byte pieces; an expanded gradient (stride 0), a transposed view or a
    slice that starts off such a boundary is packed first.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# -------------------------------------------------------------------------------- forward


@_impl("experts_forward")
def experts_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``out[t] = sum over t's slots of score * (act(x[t] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])``.

    Returns ``out (T, H)`` and the pre-activation ``h (R, 2I | I)``, empty ``(0,)`` unless
    ``store_preact``. Source: SonicMoE (arXiv 2512.14080), section 3, forward.
    """
    out, h = experts_output(*arguments)
    return out, out.new_empty((0,)) if h is None else h


def experts_output(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    scores: Tensor,
    offset_by_expert: Tensor,
    token_by_row: Tensor,
    slot_by_row: Tensor,
    row_by_slot: Tensor,
    offset_by_token: Tensor | None,
    slot_by_position: Tensor | None,
    top_k: int,
    activation: str,
    layout: str,
    impl: str,
    store_preact: bool,
    w1_main_grad: Tensor | None,
    w2_main_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What the forward operator computes, with None for a pre-activation that is not stored."""
    num_tokens = x.shape[0]
    if token_by_row.shape[0] == 0:
        h = x.new_empty((0, w1.shape[1])) if store_preact else None
        return x.new_zeros(x.shape), h
    stages = _load_stages(impl, x.device)
    if (w1.data_ptr() | w2.data_ptr()) & 15:
        require_aligned(impl, w1=w1, w2=w2)
    with _region(x, impl):
        h, a = stages.up_forward(
            _rows_16b(x),
            w1,
            b1,
            token_by_row,
            offset_by_expert,
            activation=_ACTIVATIONS[activation],
            layout=_LAYOUTS[layout],
            store_preact=store_preact,
        )
        y = stages.down_forward(a, w2, b2, offset_by_expert)
        del a
        out = stages.combine(
            y, row_by_slot, scores, offset_by_token, slot_by_position, num_tokens, top_k
        )
    return out, h


@_fake("experts_forward")
def _experts_forward_fake(x: Tensor, w1: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, token_by_row, _, _, _, _, _, _, _, _, store_preact, _, _ = others
    preact_shape = (token_by_row.shape[0], w1.shape[1]) if store_preact else (0,)
    return x.new_empty(x.shape), x.new_empty(preact_shape)


# ------------------------------------------------------------------------------- backward


class _Backward(NamedTuple):
    """Arguments of ``experts_backward``, in the order of its schema, and the main gradients."""

    dout: Tensor
    x: Tensor | None
    w1: Tensor
    w2: Tensor
    b2: Tensor | None
    h: Tensor
    scores: Tensor
    offset_by_expert: Tensor
    token_by_row: Tensor
    slot_by_row: Tensor
    row_by_slot: Tensor
    offset_by_token: Tensor | None
    slot_by_position: Tensor | None
    top_k: int
    activation: str
    layout: str
    impl: str
    needs: list[bool]
    w1_main_grad: Tensor | None = None
    w2_main_grad: Tensor | None = None
    overwrite_h: bool = False
    whole_dx: bool = False

    def make_gradients(self, make: Callable[..., Tensor]) -> SomeGradients:
        """The six results by ``make`` (``torch.zeros``, ...), None for one not asked for."""
        w1, w2 = self.w1.shape, self.w2.shape
        shapes = (self.dout.shape, w1, w1[:2], w2, w2[:2], self.scores.shape)
        wanted = list(self.needs)
        wanted[1] = wanted[1] and self.w1_main_grad is None
        wanted[3] = wanted[3] and self.w2_main_grad is None
        dx, dw1, db1, dw2, db2, dscores = (
            make(shape, dtype=anchor.dtype, device=anchor.device) if want else None
            for shape, want, anchor in zip(shapes, wanted, self.anchors, strict=True)
        )
        return dx, dw1, db1, dw2, db2, dscores

    def complete(self, gradients: SomeGradients) -> Gradients:
        """``gradients`` with a tensor of shape ``(0,)`` for each None: operators return tensors,
        of which no two may share memory."""
        dx, dw1, db1, dw2, db2, dscores = (
            anchor.new_empty((0,)) if gradient is None else gradient
            for gradient, anchor in zip(gradients, self.anchors, strict=True)
        )
        return dx, dw1, db1, dw2, db2, dscores

    @property
    def anchors(self) -> tuple[Tensor, ...]:
        """A tensor of each result's dtype and device."""
        return (self.dout,) * 5 + (self.scores,)


def experts_gradients(*arguments: Any) -> SomeGradients:
    """What the backward operators compute, with None for what is not asked for.

    With ``overwrite_h``, ``h`` is used up: the gradient of the pre-activation takes its memory.
    With ``whole_dx``, the rows of dX are made at once, however large they are.
    """
    call = _Backward(*arguments)
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_scores = call.needs
    if call.token_by_row.shape[0] == 0:
        return call.make_gradients(torch.zeros)
    dout, w1, w2, b2, scores = call.dout, call.w1, call.w2, call.b2, call.scores
    token_by_row, offset_by_expert = call.token_by_row, call.offset_by_expert
    w1_main_grad, w2_main_grad = call.w1_main_grad, call.w2_main_grad
    act, order = _ACTIVATIONS[call.activation], _LAYOUTS[call.layout]
    stages = _load_stages(call.impl, dout.device)
    require_aligned(call.impl, w1_main_grad=w1_main_grad, w2_main_grad=w2_main_grad)
    dx = dw1 = db1 = dw2 = db2 = dscores = None
    with _region(dout, call.impl):
        dout = _rows_16b(dout)
        score_by_row = stages.gather_scores(scores, call.slot_by_row)
        if needs_b2:
            db2 = stages.bias_grad_gathered(dout, token_by_row, score_by_row, offset_by_expert)
        if not (needs_x or needs_w1 or needs_b1 or needs_w2 or needs_scores):
            return dx, dw1, db1, dw2, db2, dscores
        dh, a_scaled, ds_partial = stages.down_backward_act(
            dout,
            w2,
            call.h,
            score_by_row,
            token_by_row,
            offset_by_expert,
            activation=act,
            overwrite_h=call.overwrite_h,
        )
        if needs_scores:
            dscores = stages.score_grad(
                ds_partial, call.row_by_slot, dout, b2, token_by_row, offset_by_expert
            ).view(call.scores.shape)
        if needs_w2:
            result = stages.down_backward_weight(
                dout, a_scaled, token_by_row, offset_by_expert, accumulate_into=w2_main_grad
            )
            dw2 = result if w2_main_grad is None else dw2
        del a_scaled, ds_partial
        if needs_w1:
            result = stages.up_backward_weight(
                call.x if call.x is None else _rows_16b(call.x),
                dh,
                token_by_row,
                offset_by_expert,
                layout=order,
                gated=act.is_gated,
                accumulate_into=w1_main_grad,
            )
            dw1 = result if w1_main_grad is None else dw1
        if needs_b1:
            db1 = stages.bias_grad_rows(dh, offset_by_expert)
            if act.is_gated:
                db1 = packed_to_rows(db1, order)
        if needs_x:
            # Some columns at a time where all of their rows would not fit beside dh.
            num_tokens, hidden_size = dout.shape
            slices: tuple[tuple[int, int], ...] = ((0, hidden_size),)
            if not call.whole_dx:
                slices = column_slices(dh.shape[0], hidden_size, dh.itemsize, dh.nbytes)
            dx = None if len(slices) == 1 else dout.new_empty(dout.shape)
            for first, columns in slices:
                dx_rows = stages.up_backward_act(
                    dh,
                    w1 if dx is None else w1.narrow(2, first, columns),
                    offset_by_expert,
                    layout=order,
                    gated=act.is_gated,
                    hidden_size=hidden_size,
                )
                if first + columns == hidden_size:
                    del dh
                part = stages.combine(
                    dx_rows,
                    call.row_by_slot,
                    None,
                    call.offset_by_token,
                    call.slot_by_position,
                    num_tokens,
                    call.top_k,
                    out=None if dx is None else dx.narrow(1, first, columns),
                )
                del dx_rows  # before the next ones are made
            dx = part if dx is None else dx
    return dx, dw1, db1, dw2, db2, dscores


@_impl("experts_backward")
def experts_backward(*arguments: Any) -> Gradients:
    """Gradients of :func:`experts_forward` for ``(x, w1, b1, w2, b2, scores)``.

    ``needs`` names, in that order, the ones to compute; the others come back with shape ``(0,)``.
    ``x`` may be None if ``dw1`` is not needed. Source: SonicMoE (arXiv 2512.14080), section 3,
    backward: ``dscores = <dout @ w2, act(h)>`` needs neither the expert outputs nor a second GEMM.
    """
    return _Backward(*arguments).complete(experts_gradients(*arguments))


@_impl("experts_backward_accumulate")
def experts_backward_accumulate(*arguments: Any) -> Gradients:
    """:func:`experts_backward` that adds ``dw1`` / ``dw2`` into fp32 main gradients where given."""
    return _Backward(*arguments).complete(experts_gradients(*arguments))


@_fake("experts_backward")
@_fake("experts_backward_accumulate")
def _experts_backward_fake(*arguments: Any) -> Gradients:
    call = _Backward(*arguments)
    return call.complete(call.make_gradients(torch.empty))


# ---------------------------------------------------------------------------- grouped_mm


def _zero_tail(rows: Tensor, offset_by_expert: Tensor, impl: str) -> Tensor:
    """Clear the rows that belong to no expert, in place, so that no garbage leaves the operator."""
    if impl == "reference":
        index = torch.arange(rows.shape[0], device=rows.device)
        return rows.masked_fill_((index >= offset_by_expert[-1]).unsqueeze(1), 0)
    from sonic.triton.tail import zero_tail

    return zero_tail(rows, offset_by_expert)


def _check_offsets(offset_by_expert: Tensor, num_rows: int) -> None:
    """Raise ArgumentError unless these are row ranges. Reads them, so not for the kernels."""
    bounds = offset_by_expert.tolist()
    for expert, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if stop < start:
            wrong = f"expert {expert} owns rows {start} to {stop}"
            break
    else:
        if bounds[0] == 0 and bounds[-1] <= num_rows:
            return
        wrong = f"offset_by_expert goes from {bounds[0]} to {bounds[-1]} for {num_rows} rows"
    raise ArgumentError(
        message(
            "grouped_mm",
            wrong,
            f"offsets that start at 0, never decrease, and end at most at the {num_rows} rows",
            "Make them with F.pad(rows_by_expert.cumsum(0), (1, 0)).int().",
        )
    )


@_impl("grouped_mm")
def grouped_mm(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offset_by_expert: Tensor, impl: str
) -> Tensor:
    """``out[r] = rows[r] @ weight[e].T + bias[e]`` for the rows r of expert e, zero elsewhere."""
    if impl == "reference":
        _check_offsets(offset_by_expert, rows.shape[0])
    if rows.shape[0] == 0:
        return rows.new_empty((0, weight.shape[1]))
    stages = _load_stages(impl, rows.device)
    require_aligned(impl, weight=weight)
    with _region(rows, impl):
        out: Tensor = stages.down_forward(_rows_16b(rows), weight, bias, offset_by_expert)
        return _zero_tail(out, offset_by_expert, impl)


@_fake("grouped_mm")
def _grouped_mm_fake(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offset_by_expert: Tensor, impl: str
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@_impl("grouped_mm_backward")
def grouped_mm_backward(
    dout: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    offset_by_expert: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`grouped_mm` for ``(rows, weight, bias)``; ``needs`` as in the experts."""
    if dout.shape[0] == 0:
        return _grouped_mm_gradients(torch.zeros, dout, weight, needs)
    stages = _load_stages(impl, dout.device)
    drows, dweight, dbias = (dout.new_empty((0,)) for _ in range(3))
    with _region(dout, impl):
        dout = _rows_16b(dout)
        if needs[0]:
            drows = stages.up_backward_act(
                dout, weight, offset_by_expert, layout=GateUpLayout.CONCATENATED, gated=False
            )
            drows = _zero_tail(drows, offset_by_expert, impl)
        if needs[1]:
            dweight = stages.up_backward_weight(
                rows if rows is None else _rows_16b(rows),
                dout,
                None,  # the rows are grouped already
                offset_by_expert,
                layout=GateUpLayout.CONCATENATED,
                gated=False,
                accumulate_into=None,
            )
        if needs[2]:
            dbias = stages.bias_grad_rows(dout, offset_by_expert)
    return drows, dweight, dbias


def _grouped_mm_gradients(
    make: Any, dout: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((dout.shape[0], weight.shape[2]), weight.shape, weight.shape[:2])
    drows, dweight, dbias = (
        make(shape if want else (0,), dtype=dout.dtype, device=dout.device)
        for shape, want in zip(shapes, needs, strict=True)
    )
    return drows, dweight, dbias


@_fake("grouped_mm_backward")
def _grouped_mm_backward_fake(
    dout: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    offset_by_expert: Tensor,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _grouped_mm_gradients(torch.empty, dout, weight, needs)
