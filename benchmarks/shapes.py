"""Layer sizes of released models, and the arithmetic that belongs to a size."""

from dataclasses import dataclass

from sonic.runtime.limits import MAX_EXPERTS, MAX_SLOTS, MAX_TOP_K

# Multiply-adds of the six GEMMs, in units of rows * H * I * 2 FLOPs: (gated, not gated).
_GEMM_UNITS = {
    "up": (2, 1),
    "down": (1, 1),
    "dh": (1, 1),
    "dw2": (1, 1),
    "dx": (2, 1),
    "dw1": (2, 1),
}
FORWARD_GEMMS = ("up", "down")
BACKWARD_GEMMS = ("dh", "dw2", "dx", "dw1")

CPU_FLOPS = 2e11  # of the forward pass: on a CPU more would take the reference minutes


@dataclass(frozen=True)
class Shape:
    """Size of one layer: T tokens, H hidden, I expert intermediate, E experts, top_k per token."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``T,H,I,E,top_k``; raises ``ValueError`` when it is not five positive integers, or
        more than any layer takes."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 5 or min(numbers) < 1:
            raise ValueError(f"expected five positive integers T,H,I,E,top_k, got {text!r}")
        shape = cls(*numbers)
        for name, value, most in (
            ("top_k", shape.top_k, MAX_TOP_K),
            ("E", shape.E, MAX_EXPERTS),
            ("T * top_k", shape.rows, MAX_SLOTS),
            ("H", shape.H, MAX_SLOTS),
            ("2 I", 2 * shape.I, MAX_SLOTS),
        ):
            if value > most:
                raise ValueError(f"{name}={value} exceeds {most} in {text!r}")
        if shape.top_k > shape.E:
            raise ValueError(f"top_k={shape.top_k} exceeds E={shape.E} in {text!r}")
        return shape

    @property
    def rows(self) -> int:
        """Rows that the experts process."""
        return self.T * self.top_k

    @property
    def problem(self) -> list[int]:
        """The five numbers as result files carry them."""
        return [self.T, self.H, self.I, self.E, self.top_k]

    def gemm_flops(self, gemm: str, gated: bool) -> int:
        """FLOPs of one of the six GEMMs (``up``, ``down``, ``dh``, ``dw2``, ``dx``, ``dw1``)."""
        return 2 * self.rows * self.H * self.I * _GEMM_UNITS[gemm][0 if gated else 1]

    def forward_flops(self, gated: bool) -> int:
        """``6 R I H`` gated, ``4 R I H`` otherwise. Router and gather-sum are not counted."""
        return sum(self.gemm_flops(gemm, gated) for gemm in FORWARD_GEMMS)

    def backward_flops(self, gated: bool) -> int:
        """``12 R I H`` gated, ``8 R I H`` otherwise."""
        return sum(self.gemm_flops(gemm, gated) for gemm in BACKWARD_GEMMS)

    def saved_bytes(self, gated: bool, element_size: int = 2) -> int:
        """Bytes kept for backward besides index metadata: ``2TH + 4RI`` for gated bf16."""
        pre_activation = self.rows * self.I * (2 if gated else 1)
        return element_size * (self.T * self.H + pre_activation)


@dataclass(frozen=True)
class NamedShape:
    """A shape with the letter the result tables use, its model, and what that model needs."""

    letter: str
    model: str
    shape: Shape
    activation: str = "swiglu"
    add_bias: bool = False


NAMED_SHAPES = (
    NamedShape("A", "SonicMoE README", Shape(32768, 4096, 1024, 128, 8)),
    NamedShape("B", "SonicMoE 7B", Shape(24576, 1536, 256, 128, 8)),
    NamedShape("C", "Qwen3-30B-A3B", Shape(32768, 2048, 768, 128, 8)),
    NamedShape("D", "DeepSeek-V3", Shape(8192, 7168, 2048, 256, 8)),
    NamedShape("E", "Qwen3-Next-80B-A3B", Shape(16384, 2048, 512, 512, 10)),
    NamedShape("F", "gpt-oss-120b", Shape(8192, 2880, 2880, 128, 4), "swiglu_oai", True),
)
# Twice the tokens of D: the size at which published figures of other packages exist.
EXTRA_SHAPES = (NamedShape("D2", "DeepSeek-V3", Shape(16384, 7168, 2048, 256, 8)),)


def named_shape(letter: str) -> NamedShape:
    """The shape with this letter; raises ``ValueError`` naming the letters there are."""
    every = {named.letter: named for named in (*NAMED_SHAPES, *EXTRA_SHAPES)}
    if letter not in every:
        raise ValueError(f"no shape {letter!r}; there are {', '.join(every)}")
    return every[letter]


DEFAULT_SHAPE = NAMED_SHAPES[0].shape
SMALL_SHAPE = Shape(256, 128, 64, 8, 2)  # what a machine without a supported GPU runs

# Comparisons with other packages: the letters above, with the token count of published figures for
# D, and all as bf16 SwiGLU without bias, which every contender has.
BARS = {
    "A": Shape(32768, 4096, 1024, 128, 8),
    "B": Shape(24576, 1536, 256, 128, 8),
    "C": Shape(32768, 2048, 768, 128, 8),
    "D": Shape(16384, 7168, 2048, 256, 8),
    "E": Shape(16384, 2048, 512, 512, 10),
    "F": Shape(8192, 2880, 2880, 128, 4),
}
# One forward of few tokens.
DECODE_TOKENS = (1, 16, 64, 256)
DECODE_SHAPE = (2048, 768, 128, 8)  # H, I, E, top_k of Qwen3-30B-A3B
