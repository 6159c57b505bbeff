"""Random layer problems of awkward sizes, each a pure function of its seed.

Sizes: T tokens, H hidden, I intermediate, E experts.
"""

import random
from dataclasses import dataclass, fields, replace
from enum import Enum

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout


class Routing(str, Enum):
    """How the tokens of a problem choose their experts."""

    UNIFORM = "uniform"  # distinct experts, every one as likely
    HOT = "hot"  # one expert gets every token
    SPARSE = "sparse"  # about half of the experts get nothing
    REPEATED = "repeated"  # a token names one expert top_k times


@dataclass(frozen=True)
class LayerProblem:
    """Everything that determines the inputs of one experts layer."""

    seed: int
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: ActivationType
    layout: GateUpLayout
    has_bias: bool
    dtype: torch.dtype
    ids_dtype: torch.dtype
    routing: Routing
    drop_fraction: float  # of the slots, given an id outside [0, E)
    contiguous: bool

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def id(self) -> str:
        """Name for a test's parametrisation."""
        parts = [
            f"seed{self.seed}",
            f"T{self.num_tokens}",
            f"H{self.hidden_size}",
            f"I{self.intermediate_size}",
            f"E{self.num_experts}",
            f"k{self.top_k}",
            self.activation.value,
            self.layout.value if self.activation.is_gated else "plain",
            str(self.dtype).removeprefix("torch."),
            self.routing.value,
        ]
        parts += ["bias"] if self.has_bias else []
        parts += ["dropped"] if self.drop_fraction else []
        parts += [] if self.contiguous else ["strided"]
        return "-".join(parts)

    def with_changes(self, **changes: object) -> "LayerProblem":
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerInputs:
    """Tensors of a problem. ``dout`` is the gradient of the output."""

    hidden_states: Tensor  # (T, H)
    topk_ids: Tensor  # (T, top_k)
    topk_weights: Tensor  # (T, top_k) float32, rows sum to one
    w1: Tensor  # (E, 2I | I, H)
    w2: Tensor  # (E, H, I)
    b1: Tensor | None  # (E, 2I | I)
    b2: Tensor | None  # (E, H)
    dout: Tensor  # (T, H)

    def to(self, dtype: torch.dtype) -> "LayerInputs":
        """The same values, every floating tensor cast to ``dtype``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        cast = {
            name: value.to(dtype)
            for name, value in values.items()
            if value is not None and value.is_floating_point()
        }
        return replace(self, **cast)


def random_problem(
    seed: int,
    *,
    max_tokens: int = 300,
    max_hidden_size: int = 320,
    max_intermediate_size: int = 320,
    max_experts: int = 24,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
) -> LayerProblem:
    """The layer problem number ``seed``.

    Sizes are odd on purpose: T from 0, E from 1, H and I multiples of 8 that are seldom multiples
    of 64. The bounds cap them and are part of what a seed means.
    """
    rng = random.Random(seed)
    num_experts = rng.choice([1, 2, 3, rng.randint(1, max_experts), max_experts])
    num_experts = min(num_experts, max_experts)
    top_k = rng.randint(1, min(num_experts, 8))
    tokens = rng.choice([0, 1, 2, 63, 64, 65, 127, rng.randint(1, max_tokens), max_tokens])
    return LayerProblem(
        seed=seed,
        num_tokens=min(tokens, max_tokens),
        hidden_size=_multiple_of_8(rng, max_hidden_size),
        intermediate_size=_multiple_of_8(rng, max_intermediate_size),
        num_experts=num_experts,
        top_k=top_k,
        activation=rng.choice(list(ActivationType)),
        layout=rng.choice(list(GateUpLayout)),
        has_bias=rng.random() < 0.4,
        dtype=rng.choice(dtypes),
        ids_dtype=rng.choice([torch.int32, torch.int64]),
        routing=rng.choice(list(Routing)),
        drop_fraction=rng.choice([0.0, 0.0, 0.2, 0.9]),
        contiguous=rng.random() < 0.7,
    )


def make_inputs(problem: LayerProblem, device: torch.device | str = "cpu") -> LayerInputs:
    """The tensors of ``problem``: the same values on every device.

    ``hidden_states`` and ``dout`` are N(0, 1), weights N(0, 1 / fan_in) and biases N(0, 0.25), so
    that every intermediate is of order one. Dropped ids are -1, E or E + 5. If the problem is not
    contiguous: rows of ``hidden_states`` are padded, ids, routing weights and ``dout`` are every
    other column of a larger tensor, transposed, and weights and biases every other expert of one.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    experts, hidden, width = problem.num_experts, problem.hidden_size, problem.intermediate_size
    preact_width = 2 * width if problem.activation.is_gated else width

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(size, generator=generator)).to(problem.dtype)

    tokens = problem.num_tokens
    inputs = LayerInputs(
        hidden_states=normal(tokens, hidden),
        topk_ids=_choose_experts(problem, generator),
        topk_weights=torch.softmax(
            torch.randn((tokens, problem.top_k), generator=generator), dim=-1
        ),
        w1=normal(experts, preact_width, hidden, std=hidden**-0.5),
        w2=normal(experts, hidden, width, std=width**-0.5),
        b1=normal(experts, preact_width, std=0.5) if problem.has_bias else None,
        b2=normal(experts, hidden, std=0.5) if problem.has_bias else None,
        dout=normal(tokens, hidden),
    )
    placed = {
        field.name: _place(field.name, tensor, problem, device)
        for field in fields(inputs)
        if (tensor := getattr(inputs, field.name)) is not None
    }
    return replace(inputs, **placed)


def _multiple_of_8(rng: random.Random, largest: int) -> int:
    preferred = rng.choice([8, 16, 24, 64, 72, 128, 136, 200, 8 * rng.randint(1, largest // 8)])
    return min(preferred, largest // 8 * 8)


def _choose_experts(problem: LayerProblem, generator: torch.Generator) -> Tensor:
    tokens, experts, top_k = problem.num_tokens, problem.num_experts, problem.top_k
    liking = torch.rand((tokens, experts), generator=generator)
    favourite = int(torch.randint(experts, (), generator=generator))
    if problem.routing is Routing.HOT:
        liking[:, favourite] = 2.0
    elif problem.routing is Routing.SPARSE:
        # At least top_k experts stay in the race, or there would be no distinct ones to choose.
        shunned = torch.randperm(experts, generator=generator)[max(top_k, experts // 2) :]
        liking[:, shunned] = -1.0
    ids = liking.topk(top_k, dim=1).indices
    ids = ids.gather(1, torch.rand((tokens, top_k), generator=generator).argsort(dim=1))
    if problem.routing is Routing.REPEATED:
        ids = ids[:, :1].expand(-1, top_k)
    dropped = torch.rand((tokens, top_k), generator=generator) < problem.drop_fraction
    outside = torch.tensor([-1, experts, experts + 5])
    replacement = outside[torch.randint(3, (tokens, top_k), generator=generator)]
    return torch.where(dropped, replacement, ids).to(problem.ids_dtype)


def _place(name: str, tensor: Tensor, problem: LayerProblem, device: torch.device | str) -> Tensor:
    tensor = tensor.to(device)
    if problem.contiguous:
        return tensor.contiguous()
    if name == "hidden_states":
        padded = tensor.new_full((tensor.shape[0], tensor.shape[1] + 8), float("nan"))
        padded[:, : tensor.shape[1]] = tensor
        return padded[:, : tensor.shape[1]]
    if name in ("topk_ids", "topk_weights", "dout"):
        # Spaced as well as transposed, for a matrix of one column would be contiguous again.
        gap = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        rows, columns = tensor.shape
        padded = tensor.new_full((columns, 2 * rows), gap)
        padded[:, ::2] = tensor.t()
        return padded[:, ::2].t()
    spaced = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), float("nan"))
    spaced[::2] = tensor
    return spaced[::2]
