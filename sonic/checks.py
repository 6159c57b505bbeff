"""What the public functions accept. Reads shapes, dtypes, devices and strides, never a value.

Every text has four parts: what was asked, what came, what is allowed, what to do. The checks cost
no synchronisation and trace under torch.compile; what only the running kernel can know (the GPU's
architecture, a missing package) is raised by ``sonic.runtime.backend`` when an operator runs.

Symbols: T tokens, H hidden size, I intermediate size, E experts, S slots of a flat list, R rows.
"""

import math
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout, KernelBackendMoE, ScoreOrder
from sonic.runtime.devices import missing_gpu
from sonic.runtime.eager import needs_dispatcher
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    LayoutError,
    ShapeError,
)
from sonic.runtime.limits import (
    KERNEL_ALIGNMENT,
    KERNEL_DTYPES,
    MAX_EXPERTS,
    MAX_KERNEL_ROWS,
    MAX_SLOTS,
    MAX_TOP_K,
    message,
)

IMPLS = ("auto", "cute", "reference")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)
_DEVICES = ("cuda", "cpu", "meta")

_Choice = TypeVar("_Choice", bound=Enum)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------- options


_MEMBERS: dict[tuple[str, str], Enum] = {
    (options.__name__, option.value): option
    for options in (ActivationType, GateUpLayout, KernelBackendMoE, ScoreOrder)
    for option in options
}


def choice(op: str, name: str, value: Any, options: type[_Choice]) -> _Choice:
    """``value`` (a member of ``options`` or its string) as a member."""
    if isinstance(value, options):
        return value
    if isinstance(value, str):
        # A table rather than a loop over the class: Dynamo of torch 2.11 does not iterate enums.
        member = _MEMBERS.get((options.__name__, value))
        if member is not None:
            return member  # type: ignore[return-value]
    raise ArgumentError(
        message(
            op,
            f"{name}={value!r} is not known",
            ", ".join(repr(option.value) for option in options),
            f"Pass one of these strings, or a member of sonic.{options.__name__}.",
        )
    )


def check_known(
    op: str, name: str, value: Any, known: tuple[str, ...], todo: str = "Pass one of these strings."
) -> None:
    """``value`` is one of the strings ``known``."""
    if not isinstance(value, str) or value not in known:
        allowed = ", ".join(map(repr, known))
        raise ArgumentError(message(op, f"{name}={value!r} is not known", allowed, todo))


LET_THE_DEVICE_DECIDE = 'Pass impl="auto" to let the device decide.'


def resolve_impl(op: str, impl: Any, device: torch.device) -> str:
    """``"cute"`` or ``"reference"`` for tensors on ``device``; only ``"auto"`` chooses."""
    check_known(op, "impl", impl, IMPLS, LET_THE_DEVICE_DECIDE)
    kind = device.type
    if kind not in _DEVICES:
        raise DeviceError(
            message(
                op,
                f"hidden_states is on {device}",
                "cuda, cpu and meta tensors",
                'Move the tensors to a CUDA device, or to the CPU with impl="reference".',
            )
        )
    if impl == "auto":
        return "cute" if kind == "cuda" else "reference"
    if impl == "cute" and kind == "cpu":
        raise DeviceError(
            message(
                op,
                'impl="cute" was asked for a tensor on cpu',
                "CUDA tensors",
                'Move the tensors to a CUDA device, or pass impl="reference".',
            )
        )
    return str(impl)


def check_is_int(op: str, name: str, value: Any, low: int, high: int) -> None:
    """``value`` is an int, in a range that the caller checks."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ArgumentError(
            message(
                op,
                f"{name}={value!r} is of type {type(value).__name__}",
                f"an int from {low} to {high}",
                f"Pass {name} as a Python int.",
            )
        )


def check_int(op: str, name: str, value: Any, low: int, high: int, why: str) -> None:
    """``value`` is an int in ``[low, high]``."""
    check_is_int(op, name, value, low, high)
    if not low <= value <= high:
        raise ArgumentError(
            message(
                op,
                f"{name}={value} is out of range",
                f"{low} to {high} ({why})",
                f"Pass {name} inside that range.",
            )
        )


def check_bool(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentError(
            message(op, f"{name}={value!r}", "True or False", f"Pass {name} as a Python bool.")
        )


def check_bools(op: str, **flags: Any) -> None:
    """Each of the flags, by its name."""
    for name, flag in flags.items():
        check_bool(op, name, flag)


_LARGEST = torch.finfo(torch.float32).max


def check_number(op: str, name: str, value: Any, todo: str, positive: bool = False) -> None:
    """A finite number of float32, at least 0 or above it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _LARGEST or (positive and value == 0):
        allowed = "a finite number above 0" if positive else "a finite number, 0 or above"
        if is_number and _LARGEST < value < math.inf:
            allowed = f"{allowed}, that float32 has"
        raise ArgumentError(message(op, f"{name}={value!r}", allowed, todo))


def check_parameters(op: str, std: Any, device: Any, dtype: Any) -> None:
    """How the parameters of a module are made; ``std`` is that of their initialisation."""
    check_number(op, "std", std, "0.02 is usual.")
    check_device_option(op, device)
    check_dtype_option(op, dtype)


def check_dtype_option(op: str, dtype: Any, optional: bool = True) -> None:
    """A dtype that the layer computes in, or None if ``optional``."""
    if dtype in FLOAT_DTYPES or (optional and dtype is None):
        return
    raise DTypeError(
        message(op, f"dtype={dtype!r}", _names(FLOAT_DTYPES), "Pass torch.bfloat16, for instance.")
    )


def check_device_option(op: str, device: Any) -> None:
    """Something that ``torch.device`` accepts and, if it is a GPU, sees. None is torch's default
    device, where it has to be able to make tensors."""
    if device is None:
        _check_default_device(op)
        return
    try:
        made_on = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            message(
                op,
                f"device={device!r} is no device ({reason})",
                'a torch.device or its name, such as "cuda", "cuda:1", "cpu" or "meta"',
                "Pass one of these.",
            )
        ) from None
    if torch._C._len_torch_dispatch_stack():
        return  # it may be a fake one
    if made_on.type not in _DEVICES:
        allowed = "cuda, cpu and meta"
        todo = "Build it on one of these, and move it with .to() where torch can."
        raise DeviceError(message(op, f"device={device!r}", allowed, todo))
    missing = missing_gpu(made_on, 'build it on the CPU or with device="meta"')
    if missing is not None:
        raise DeviceError(f"{op}: device: {missing}.")


def _check_default_device(op: str) -> None:
    try:
        torch.empty(0)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            message(
                op,
                "no device is given, and torch makes no tensors on the default that torch.device "
                f"or torch.set_default_device chose ({reason})",
                'a default of "cpu", "meta" or a GPU that torch sees',
                "Choose another default, or pass device=.",
            )
        ) from error


def check_num_experts(op: str, name: str, value: Any) -> None:
    check_int(op, name, value, 1, MAX_EXPERTS, "what the routing kernels are tested for")


# -------------------------------------------------------------------------------- tensors


def check_is_tensor(op: str, name: str, value: Any) -> None:
    """``value`` is a strided tensor."""
    if not isinstance(value, Tensor):
        todo = f"Convert {name} with torch.as_tensor."
        if isinstance(value, torch.nn.Module):
            todo = f"Pass the parameter of that module: {name}=module.weight."
        elif value is None:
            todo = f"Pass {name}; it is not optional."
        kind = type(value).__name__
        raise ArgumentError(message(op, f"{name} is of type {kind}", "a torch.Tensor", todo))
    if value.layout is not torch.strided:
        raise LayoutError(
            message(
                op,
                f"{name} has layout {value.layout}",
                "torch.strided",
                f"Convert it with {name}.to_dense().",
            )
        )


def check_tensor(op: str, name: str, value: Any, axes: tuple[str, ...], todo: str) -> None:
    """``value`` is a strided tensor with one axis per name in ``axes``."""
    check_is_tensor(op, name, value)
    if value.dim() != len(axes):
        raise ShapeError(
            message(
                op,
                f"{name} has shape {tuple(value.shape)}",
                f"{len(axes)} axes, ({', '.join(axes)})",
                todo,
            )
        )


def check_table(op: str, name: str, value: Any, top_k: Any) -> None:
    """``value`` is (T, E), floating point, such as logits, and ``top_k`` of its columns can win."""
    check_is_tensor(op, name, value)
    if value.dim() != 2:
        todo = f"Flatten the leading axes: {name}.flatten(0, -2)."
        if value.dim() < 2:
            todo = f"Pass one row of {name} per token."
        check_tensor(op, name, value, ("T", "E"), todo)
    num_experts = value.shape[1]
    if not 1 <= num_experts <= MAX_EXPERTS:
        todo = f"Give one column of {name} per expert."
        came = f"{name} of {num_experts} experts"
        raise ShapeError(message(op, came, f"1 to {MAX_EXPERTS}", todo))
    check_float(op, name, value)
    check_top_k(op, top_k, num_experts)


def check_top_k(
    op: str, top_k: Any, columns: int, what: str = "experts", symbol: str = "E"
) -> None:
    """``top_k`` is an int, and can be chosen of so many columns, which are ``what``."""
    limit = min(MAX_TOP_K, columns)
    check_is_int(op, "top_k", top_k, 1, limit)
    if not 1 <= top_k <= limit:
        raise ArgumentError(
            message(
                op,
                f"top_k={top_k} came with {columns} {what}",
                f"1 to {limit} (at most {MAX_TOP_K} and at most {symbol}={columns})",
                "Pass top_k inside that range.",
            )
        )


def check_shape(op: str, name: str, value: Tensor, expected: dict[str, Any], todo: str) -> None:
    """``value.shape`` equals ``expected``, a mapping from axis name to size."""
    if tuple(value.shape) != tuple(expected.values()):
        sizes = ", ".join(f"{axis}={size}" for axis, size in expected.items())
        raise ShapeError(message(op, f"{name} has shape {tuple(value.shape)}", f"({sizes})", todo))


def check_same_device(op: str, first: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Every tensor of ``others`` lies on the device of ``anchor``."""
    for name, other in others.items():
        if other is not None and other.device != anchor.device:
            raise DeviceError(
                message(
                    op,
                    f"{name} is on {other.device} and {first} on {anchor.device}",
                    "one device for all tensors",
                    f"Move {name} to {anchor.device}.",
                )
            )


def check_same_dtype(op: str, first: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Every tensor of ``others`` has the dtype of ``anchor``."""
    for name, other in others.items():
        if other is None or other.dtype == anchor.dtype:
            continue
        check_float(op, name, other)
        todo = f"Cast one of them, or run under torch.autocast({anchor.device.type!r})."
        if anchor.dtype == torch.float64:  # autocast leaves it alone
            todo = f"Cast one of them, for instance {first}.to({other.dtype})."
        raise DTypeError(
            message(
                op,
                f"{name} is {_dtype(other)} and {first} {_dtype(anchor)}",
                "one dtype for activations, weights and biases",
                todo,
            )
        )


def check_ids(op: str, name: str, ids: Tensor) -> None:
    if ids.dtype not in ID_DTYPES:
        todo = f"Cast it: {name}.int()."
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            todo = "Pass indices, as torch.topk returns them, rather than scores or a mask."
        raise DTypeError(message(op, f"{name} is {_dtype(ids)}", _names(ID_DTYPES), todo))


def check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        todo = f"Cast it: {name}.float()."
        if value.is_complex():
            todo = f"Pass a real tensor, such as {name}.real or {name}.abs()."
        elif value.dtype.itemsize == 1 and value.dtype != torch.bool:
            todo = f"If {name} is quantised, multiply by its scales first: the layer reads none."
        raise DTypeError(message(op, f"{name} is {_dtype(value)}", _names(FLOAT_DTYPES), todo))


def check_num_slots(op: str, num_slots: int, impl: str, is_call: bool = True) -> None:
    """The number of rows is one that ``impl`` can address; ``is_call`` if ``op`` takes ``impl``."""
    if impl == "cute" and num_slots > MAX_KERNEL_ROWS:
        todo = "Split the tokens over several calls"
        if is_call and num_slots <= MAX_SLOTS:
            todo += ', or pass impl="reference"'
        raise ShapeError(
            message(
                op,
                f"{num_slots} slots (token-expert pairs)" + (' with impl="cute"' * is_call),
                f"at most {MAX_KERNEL_ROWS}, since one expert may get all of them",
                f"{todo}.",
            )
        )
    if num_slots > MAX_SLOTS:
        raise ShapeError(
            message(
                op,
                f"{num_slots} slots (token-expert pairs)",
                f"at most {MAX_SLOTS}, since row indices are int32",
                "Split the tokens over several calls.",
            )
        )


# ------------------------------------------------------------------------- kernel limits


def check_kernel_operands(op: str, first: str, x: Tensor, **weights: Tensor | None) -> None:
    """What only the kernels ask for: a 2-byte dtype and weights with contiguous, aligned rows."""
    if _dtype(x) not in KERNEL_DTYPES:
        raise DTypeError(
            message(
                op,
                f'{first} is {_dtype(x)} with impl="cute"',
                ", ".join(KERNEL_DTYPES),
                'Cast the tensors, run under torch.autocast, or pass impl="reference".',
            )
        )
    for name, weight in weights.items():
        if weight is None:
            continue
        strides = weight.stride()
        if not weight.is_contiguous() and not _addressable(weight):
            raise LayoutError(
                message(
                    op,
                    f"{name} has strides {strides} for shape {tuple(weight.shape)}",
                    "contiguous rows, whose strides are positive multiples of "
                    f'{KERNEL_ALIGNMENT}, with impl="cute"',
                    f"Store it packed once, {name}.contiguous(), rather than at every call.",
                )
            )


def _addressable(weight: Tensor) -> bool:
    """Whether TMA can read ``weight`` in place: rows are contiguous and start at 16-byte steps."""
    *outer, last = weight.stride()
    if last != 1 and weight.shape[-1] > 1:
        return False
    if weight.dim() < 3:  # a bias is read element by element
        return True
    sizes = weight.shape[:-1]
    return all(
        size == 1 or (stride > 0 and stride % KERNEL_ALIGNMENT == 0)
        for size, stride in zip(sizes, outer, strict=True)
    )


def check_aligned(op: str, name: str, size: int, is_call: bool = True) -> None:
    """The kernels move rows in 16-byte pieces, so a row must be a whole number of them;
    ``is_call`` if ``op`` takes ``impl``."""
    if size % KERNEL_ALIGNMENT != 0 or size == 0:
        up = max(1, -(-size // KERNEL_ALIGNMENT)) * KERNEL_ALIGNMENT
        raise ShapeError(
            message(
                op,
                f"{name}={size}" + (' with impl="cute"' * is_call),
                f"positive multiples of {KERNEL_ALIGNMENT} (rows of whole 16-byte pieces)",
                f"Pad it to {up}" + (', or pass impl="reference"' * is_call) + ".",
            )
        )


# --------------------------------------------------------------------------- whole calls


def check_hidden_size(op: str, hidden_states: Any, hidden_size: int, todo: str) -> None:
    """``hidden_states`` is (..., hidden_size), floating point."""
    check_is_tensor(op, "hidden_states", hidden_states)
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != hidden_size:
        raise ShapeError(
            message(
                op,
                f"hidden_states has shape {tuple(hidden_states.shape)}",
                f"(..., {hidden_size})",
                todo,
            )
        )
    check_float(op, "hidden_states", hidden_states)


def check_hidden_states(op: str, hidden_states: Any) -> None:
    check_tensor(
        op,
        "hidden_states",
        hidden_states,
        ("T", "H"),
        "Flatten the leading axes: hidden_states.reshape(-1, hidden_states.shape[-1]).",
    )
    check_float(op, "hidden_states", hidden_states)


def check_weights(
    op: str,
    hidden_states: Tensor,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    activation: ActivationType,
    impl: str,
) -> None:
    """Shapes, devices and dtypes of the expert weights, after any autocast."""
    check_tensor(op, "w1", w1, ("E", "2I or I", "H"), "Stack the experts along the first axis.")
    check_tensor(op, "w2", w2, ("E", "H", "I"), "Stack the experts along the first axis.")
    num_experts, width, hidden_size = w1.shape
    check_num_experts(op, "the number of experts", num_experts)
    if hidden_size != hidden_states.shape[1]:
        raise ShapeError(
            message(
                op,
                f"w1 has hidden size {hidden_size} (shape {tuple(w1.shape)}) and hidden_states "
                f"{hidden_states.shape[1]}",
                "w1 (E, 2I or I, H) with the H of hidden_states",
                "Check for a transposed weight: w1.transpose(1, 2).contiguous().",
            )
        )
    gated = activation.is_gated
    if gated and width % 2 != 0:
        raise ShapeError(
            message(
                op,
                f"w1 has {width} rows per expert with activation={activation.value!r}",
                "an even number, 2I, since the activation is gated",
                "Store the gate and the up rows, or choose an activation that is not gated.",
            )
        )
    intermediate = width // 2 if gated else width
    check_shape(
        op,
        "w2",
        w2,
        {"E": num_experts, "H": hidden_size, "I": intermediate},
        f"I follows from w1 {tuple(w1.shape)} and activation={activation.value!r}, which is "
        f"{'gated: w1 has 2I rows' if gated else 'not gated: w1 has I rows'} per expert.",
    )
    for name, bias, size in (("b1", b1, width), ("b2", b2, hidden_size)):
        if bias is not None:
            check_tensor(op, name, bias, ("E", "rows"), "Give one bias per row of the weight.")
            check_shape(
                op,
                name,
                bias,
                {"E": num_experts, "rows": size},
                "Give one bias per row of the weight, or None.",
            )
    check_same_device(op, "hidden_states", hidden_states, w1=w1, b1=b1, w2=w2, b2=b2)
    check_same_dtype(op, "hidden_states", hidden_states, w1=w1, b1=b1, w2=w2, b2=b2)
    if impl == "cute":
        check_kernel_operands(op, "hidden_states", hidden_states, w1=w1, b1=b1, w2=w2, b2=b2)
        check_aligned(op, "hidden_size", hidden_size)
        check_aligned(op, "intermediate_size", intermediate)


def check_topk(op: str, hidden_states: Tensor, topk_ids: Any, topk_weights: Any, impl: str) -> None:
    axes = ("T", "top_k")
    check_tensor(op, "topk_ids", topk_ids, axes, "Pass one row of expert ids per token.")
    check_tensor(op, "topk_weights", topk_weights, axes, "Pass one weight per expert id.")
    check_ids(op, "topk_ids", topk_ids)
    check_float(op, "topk_weights", topk_weights)
    check_int(op, "top_k (columns of topk_ids)", topk_ids.shape[1], 1, MAX_SLOTS, "one at least")
    if topk_ids.shape[0] != hidden_states.shape[0]:
        raise ShapeError(
            message(
                op,
                f"topk_ids has {topk_ids.shape[0]} rows for {hidden_states.shape[0]} tokens",
                "one row per token, (T, top_k)",
                "Route the same tokens, or use sonic.experts_flat for any list of pairs.",
            )
        )
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            message(
                op,
                f"topk_weights has shape {tuple(topk_weights.shape)}",
                f"that of topk_ids, {tuple(topk_ids.shape)}",
                "Pass one weight per expert id; gather(1, topk_ids) turns (T, E) scores into that.",
            )
        )
    check_same_device(
        op, "hidden_states", hidden_states, topk_ids=topk_ids, topk_weights=topk_weights
    )
    check_num_slots(op, topk_ids.shape[0] * topk_ids.shape[1], impl)


def check_flat(
    op: str, hidden_states: Tensor, token_ids: Any, expert_ids: Any, weights: Any, impl: str
) -> None:
    for name, value in (("token_ids", token_ids), ("expert_ids", expert_ids)):
        check_tensor(op, name, value, ("S",), f"Flatten it: {name}.reshape(-1).")
        check_ids(op, name, value)
    check_tensor(op, "weights", weights, ("S",), "Flatten it: weights.reshape(-1).")
    check_float(op, "weights", weights)
    if not token_ids.shape[0] == expert_ids.shape[0] == weights.shape[0]:
        raise ShapeError(
            message(
                op,
                f"token_ids, expert_ids and weights have {token_ids.shape[0]}, "
                f"{expert_ids.shape[0]} and {weights.shape[0]} entries",
                "one length S for the three, entry i saying that a token visits an expert",
                "Build the three lists from the same pairs.",
            )
        )
    check_same_device(
        op,
        "hidden_states",
        hidden_states,
        token_ids=token_ids,
        expert_ids=expert_ids,
        weights=weights,
    )
    check_num_slots(op, token_ids.shape[0], impl)


def check_main_grads(op: str, main_grads: Any, w1: Tensor, w2: Tensor) -> None:
    """A pair of optional fp32 accumulators, one for ``w1`` and one for ``w2``."""
    if not isinstance(main_grads, (tuple, list)) or len(main_grads) != 2:
        raise ArgumentError(
            message(
                op,
                f"main_grads is {type(main_grads).__name__}"
                + (f" of {len(main_grads)}" if isinstance(main_grads, (tuple, list)) else ""),
                "a pair (for w1, for w2) of float32 tensors or None",
                "Pass main_grads=(w1.main_grad, w2.main_grad).",
            )
        )
    for name, grad, weight in (("w1", main_grads[0], w1), ("w2", main_grads[1], w2)):
        if grad is None:
            continue
        label = f"main_grads for {name}"
        check_tensor(op, label, grad, ("E", "rows", "columns"), f"Make it like {name}.")
        check_shape(
            op,
            label,
            grad,
            dict(zip(("E", "rows", "columns"), weight.shape, strict=True)),
            f"Make it with torch.zeros_like({name}, dtype=torch.float32).",
        )
        check_same_device(op, name, weight, **{label: grad})
        if grad.dtype != torch.float32:
            raise DTypeError(
                message(
                    op,
                    f"{label} is {_dtype(grad)}",
                    "float32",
                    f"Make it with torch.zeros_like({name}, dtype=torch.float32).",
                )
            )
        if not grad.is_contiguous():
            raise LayoutError(
                message(
                    op,
                    f"{label} has strides {tuple(grad.stride())} for shape {tuple(grad.shape)}",
                    "contiguous accumulators",
                    f"Make it with torch.zeros({name}.shape, dtype=torch.float32).",
                )
            )
        if grad.requires_grad:
            raise ArgumentError(
                message(
                    op,
                    f"{label} requires a gradient",
                    "plain accumulators",
                    f"Pass it detached; {name} itself stays the parameter.",
                )
            )
    if not needs_dispatcher((w1, w2, *main_grads)):  # whose tensors may have no memory
        _check_apart(op, main_grads, w1, w2)


def _check_apart(op: str, main_grads: Any, w1: Tensor, w2: Tensor) -> None:
    """The accumulators share no memory with each other or with a weight."""
    names = ("main_grads for w1", "main_grads for w2", "w1", "w2")
    spans = [
        (name, value.data_ptr(), value.data_ptr() + _extent(value))
        for name, value in zip(names, (*main_grads, w1, w2), strict=True)
        if value is not None
    ]
    for index, (name, start, stop) in enumerate(spans):
        for other, its_start, its_stop in spans[index + 1 :]:
            if name.startswith("main_grads") and start < its_stop and its_start < stop:
                raise ArgumentError(
                    message(
                        op,
                        f"{name} and {other} share memory",
                        "accumulators apart from each other and from the weights",
                        "Make each with torch.zeros_like(weight, dtype=torch.float32).",
                    )
                )


def _extent(value: Tensor) -> int:
    """Bytes from the first to the last element."""
    if value.numel() == 0:
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * value.itemsize


def check_router(
    op: str, hidden_states: Tensor, router_weight: Any, num_experts: int, top_k: Any, impl: str
) -> None:
    check_tensor(op, "router_weight", router_weight, ("E", "H"), "Pass the router's weight.")
    check_float(op, "router_weight", router_weight)
    check_shape(
        op,
        "router_weight",
        router_weight,
        {"E": num_experts, "H": hidden_states.shape[1]},
        "Give one row of router weights per expert of w1.",
    )
    check_same_device(op, "hidden_states", hidden_states, router_weight=router_weight)
    check_top_k(op, top_k, num_experts)
    check_num_slots(op, hidden_states.shape[0] * top_k, impl)


def check_grouped_mm(
    op: str, rows: Any, weight: Any, offset_by_expert: Any, bias: Any, impl: str
) -> None:
    check_tensor(op, "weight", weight, ("E", "N", "K"), "Stack the experts along the first axis.")
    num_experts, width, depth = weight.shape
    check_num_experts(op, "the number of experts", num_experts)
    if rows.shape[1] != depth:
        raise ShapeError(
            message(
                op,
                f"rows has {rows.shape[1]} columns and weight {depth} (shape "
                f"{tuple(weight.shape)})",
                "rows (R, K) and weight (E, N, K) with one K",
                "Check for a transposed weight: weight.transpose(1, 2).contiguous().",
            )
        )
    check_tensor(
        op, "offset_by_expert", offset_by_expert, ("E + 1",), "Pass the row range of each expert."
    )
    check_shape(
        op,
        "offset_by_expert",
        offset_by_expert,
        {"E + 1": num_experts + 1},
        "It starts at 0: F.pad(rows_by_expert.cumsum(0), (1, 0)).int().",
    )
    if offset_by_expert.dtype != torch.int32:
        raise DTypeError(
            message(
                op,
                f"offset_by_expert is {_dtype(offset_by_expert)}",
                "int32",
                "Cast it: offset_by_expert.int().",
            )
        )
    if bias is not None:
        check_tensor(op, "bias", bias, ("E", "N"), "Give one bias per row of the weight.")
        check_shape(
            op,
            "bias",
            bias,
            {"E": num_experts, "N": width},
            "Give one bias per row of the weight, or None.",
        )
    check_same_device(op, "rows", rows, weight=weight, offset_by_expert=offset_by_expert, bias=bias)
    check_same_dtype(op, "rows", rows, weight=weight, bias=bias)
    check_num_slots(op, rows.shape[0], impl)
    if impl == "cute":
        check_kernel_operands(op, "rows", rows, weight=weight, bias=bias)
        check_aligned(op, "the reduction size K", depth)
        check_aligned(op, "the output size N", width)
