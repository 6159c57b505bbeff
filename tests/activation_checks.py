"""Activations in the epilogues, element by element: shared by the GPU and the emulator tests."""

import torch

from sonic import stages
from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import stages as reference

WIDTH = 8


class Grid:
    """One expert whose pre-activation is a grid of gates and ups, exactly."""

    def __init__(self, activation: ActivationType, values: torch.Tensor):
        """``values``: gates, one per row; ups run from -4 to 4. Its dtype and device are used."""
        self.activation = activation
        halves = 2 if activation.is_gated else 1
        ups = torch.linspace(-4, 4, WIDTH, device=values.device).to(values.dtype)
        gates = values[:, None].expand(-1, WIDTH)
        self.x = torch.cat([gates, ups.expand_as(gates)], dim=1)[:, : halves * WIDTH].contiguous()
        order = torch.arange(halves * WIDTH).view(halves, WIDTH).t().flatten()  # g0 u0 g1 u1 ...
        one_hot = torch.eye(halves * WIDTH)[order].to(values)
        self.w1 = one_hot[None].contiguous()
        rows = len(values)
        integers = {"dtype": torch.int32, "device": values.device}
        self.token_by_row = torch.arange(rows, **integers)
        self.offset_by_expert = torch.tensor([0, rows], **integers)
        self.score = torch.full((rows,), 0.5, device=values.device)
        self.dout = torch.ones_like(self.x[:, :WIDTH])
        self.w2 = torch.eye(WIDTH)[None].to(values)

    def _converted(self, dtype, name):
        return getattr(self, name).to(dtype)

    def forward(self, module, dtype):
        """``(h, a)`` of ``module``'s up-projection."""
        return module.up_forward(
            self._converted(dtype, "x"), self._converted(dtype, "w1"), None,
            self.token_by_row, self.offset_by_expert, activation=self.activation,
            layout=GateUpLayout.INTERLEAVED, store_preact=True,
        )  # fmt: skip

    def backward(self, module, dtype, h):
        """``(dh, a', ds)`` of ``module``'s backward epilogue."""
        dh, a_scaled, ds_partial = module.down_backward_act(
            self._converted(dtype, "dout"), self._converted(dtype, "w2"), h.to(dtype), self.score,
            self.token_by_row, self.offset_by_expert, activation=self.activation,
        )  # fmt: skip
        return dh, a_scaled, ds_partial.sum(0)


def results(grid: Grid, module, dtype) -> list[torch.Tensor]:
    h, a = grid.forward(module, dtype)
    return [h, a, *grid.backward(module, dtype, h)]


def check_nan(activation: ActivationType, dtype: torch.dtype, device: str) -> None:
    """A NaN pre-activation is NaN in every output in which the reference has one."""
    values = torch.linspace(-3, 3, 64, device=device).to(dtype)
    values[17] = float("nan")
    grid = Grid(activation, values)
    got, want = results(grid, stages, dtype), results(grid, reference, dtype)
    for kernel, specified in zip(got, want, strict=True):
        assert torch.equal(kernel.isnan(), specified.isnan())
        assert not specified.isnan().all()
    for specified in (want[0], want[1], want[-1]):  # h, a, ds
        assert specified.isnan().any()


def check_grid(activation: ActivationType, dtype: torch.dtype, device: str) -> None:
    """Twice the rounding of the output type, and the documented error of a bfloat16 sigmoid."""
    values = torch.linspace(-20, 20, 4001, device=device).to(dtype)
    grid = Grid(activation, values)
    exact = results(grid, reference, torch.float64)
    rounded = results(grid, reference, dtype)
    ulp = torch.finfo(dtype).eps
    for name, got, want, low in zip(
        ("h", "a", "dh", "a_scaled", "ds"),
        results(grid, stages, dtype),
        exact,
        rounded,
        strict=True,
    ):
        error = (got.double() - want).abs()
        # The backward starts from the rounded pre-activation, which is exact here.
        allowed = 2 * (low.double() - want).abs() + ulp * want.abs()
        sigmoid_error = 0.0 if dtype == torch.float16 else 2.0**-12
        reach = values.double().abs()[:, None] + 1
        slack = sigmoid_error * 6 * reach if error.dim() == 2 else sigmoid_error * 48 * reach[:, 0]
        worst = (error - allowed - slack - 1e-5).max().item()
        assert worst <= 0, f"{name}: {worst} above the bound"
