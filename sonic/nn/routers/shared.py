"""Shared experts: the dense branch beside the routed ones."""

import torch
from torch import Tensor, nn

from sonic import checks
from sonic.enums import ActivationType, GateUpLayout
from sonic.nn.moe import Experts, NormalLinear, of_layer
from sonic.routing.logits import router_logits
from sonic.runtime.errors import SonicError


class SharedExperts(Experts):
    """One wide expert that every token visits, through the kernels of the routed experts.

    ``out = c_proj(act(c_fc(x)))``, times ``sigmoid(x @ gate.weight.T)`` if gated. Several shared
    experts of equal width are one expert of their total width.

    Args:
        hidden_size: H. intermediate_size: total width of the branch.
        activation_function, add_bias, std, layout, device, dtype: as in :class:`sonic.Experts`.
        gated: whether there is a ``gate`` (Qwen2-MoE).

    Parameters: those of :class:`sonic.Experts` with E = 1, and ``gate.weight`` (1, H).
    """

    gate: nn.Linear | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation_function: str | ActivationType = ActivationType.SWIGLU,
        add_bias: bool = False,
        std: float = 0.02,
        *,
        gated: bool = False,
        layout: str | GateUpLayout = GateUpLayout.INTERLEAVED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            1,
            hidden_size,
            intermediate_size,
            activation_function,
            add_bias,
            std,
            layout=layout,
            device=device,
            dtype=dtype,
        )
        checks.check_bool("SharedExperts", "gated", gated)
        self.gate = None
        if gated:
            self.gate = NormalLinear(hidden_size, 1, std, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, impl: str = "auto") -> Tensor:  # type: ignore[override]
        """``hidden_states`` (..., H) to the same shape; see :func:`sonic.experts` for ``impl``."""
        checks.check_hidden_size(
            "SharedExperts",
            hidden_states,
            self.hidden_size,
            "Build the shared experts with the hidden size of the layer.",
        )
        tokens = hidden_states.reshape(-1, self.hidden_size)
        shape = (tokens.shape[0], 1)
        ids = torch.zeros(shape, dtype=torch.int32, device=tokens.device)
        if self.gate is None:
            weights = torch.ones(shape, dtype=torch.float32, device=tokens.device)
        else:
            try:
                logits = router_logits(tokens, self.gate.weight, self.gate.bias)
            except SonicError as error:
                raise of_layer(error, "SharedExperts", {r"\bweight\b": "gate.weight"}) from error
            weights = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return super().forward(tokens, ids, weights, impl).view(hidden_states.shape)
