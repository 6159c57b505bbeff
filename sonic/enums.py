"""The closed vocabularies of the public API. Imports the errors and the standard library only."""

from enum import Enum

from sonic.runtime.errors import ArgumentError


class ActivationType(str, Enum):
    """Activation between the up-projection and the down-projection.

    With gate ``g``, up ``u`` (gated) or a single pre-activation ``x`` (not gated):

    ================  =====  ============================================================
    value             gated  post-activation
    ================  =====  ============================================================
    ``swiglu``        yes    ``u * silu(g)``
    ``swiglu_oai``    yes    gpt-oss: ``(clip(u, -7, 7) + 1) * g' * sigmoid(1.702 g')``
                             with ``g' = min(g, 7)``
    ``geglu``         yes    ``u * gelu(g)``, exact (erf)
    ``geglu_tanh``    yes    ``u * gelu(g)``, tanh approximation
    ``reglu``         yes    ``u * relu(g)``
    ``relu_sq``       no     ``relu(x) ** 2``
    ``relu``          no     ``relu(x)``
    ``silu``          no     ``x * sigmoid(x)``
    ``gelu``          no     exact (erf)
    ``gelu_tanh``     no     tanh approximation
    ================  =====  ============================================================
    """

    SWIGLU = "swiglu"
    SWIGLU_OAI = "swiglu_oai"
    GEGLU = "geglu"
    GEGLU_TANH = "geglu_tanh"
    REGLU = "reglu"
    RELU_SQ = "relu_sq"
    RELU = "relu"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"

    __hash__ = str.__hash__  # as equality is; that of Enum runs Python at every look-up

    @property
    def is_gated(self) -> bool:
        return self in _GATED


_GATED = frozenset(
    {
        ActivationType.SWIGLU,
        ActivationType.SWIGLU_OAI,
        ActivationType.GEGLU,
        ActivationType.GEGLU_TANH,
        ActivationType.REGLU,
    }
)


def is_glu(activation: str | ActivationType) -> bool:
    """True if the activation takes a gate and an up half (``w1`` has ``2I`` rows per expert).

    Raises:
        ArgumentError: ``activation`` is no :class:`ActivationType` and no value of it.
    """
    try:
        return ActivationType(activation).is_gated
    except ValueError:
        known = ", ".join(repr(member.value) for member in ActivationType)
        raise ArgumentError(
            f"is_glu: activation={activation!r} is not known. Allowed: {known}. Pass one of these "
            "strings, or a member of sonic.ActivationType."
        ) from None


class GateUpLayout(str, Enum):
    """Order of the gate and up rows along the ``2I`` axis of ``w1`` and ``b1`` if gated."""

    INTERLEAVED = "interleaved"  # g0 u0 g1 u1 ...
    CONCATENATED = "concatenated"  # g0 .. g(I-1) u0 .. u(I-1), the Hugging Face order

    __hash__ = str.__hash__


class ScoreOrder(str, Enum):
    """Which of softmax and top-k comes first in the router."""

    SOFTMAX_OVER_TOPK = "softmax_over_topk"
    TOPK_OVER_SOFTMAX = "topk_over_softmax"
    TOPK_OVER_SOFTMAX_NORM = "topk_over_softmax_norm"  # winners renormalised to sum to one


class KernelBackendMoE(str, Enum):
    """Implementation that :class:`sonic.MoE` runs."""

    sonicmoe = "sonicmoe"  # our CuTeDSL kernels
    torch = "torch"  # the reference, any device
    scattermoe = "scattermoe"  # upstream's third option; refused with a clear error
