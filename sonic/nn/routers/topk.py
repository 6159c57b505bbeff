"""Routers that choose the top-k columns of one matrix product, and their balancing state.

Symbols: T tokens, H hidden size, E experts, C columns of the logits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sonic import checks
from sonic.nn.routers.base import (
    LossWeights,
    Router,
    RouterOutput,
    SharedReference,
    num_sequences,
)
from sonic.plan import build_plan
from sonic.routing.balancing import (
    DROP_RULES,
    RoutingStatistics,
    all_reduced,
    capacity_of_ratio,
    check_factor,
    check_group,
    corrected_bias,
    exact_ratio,
    global_batch_loss,
    limit_capacity,
    local_load,
    refuse_capture,
)
from sonic.routing.counts import EarlierLoads, count, earlier_load
from sonic.routing.logits import router_logits
from sonic.routing.route import check_options, plan_of, route
from sonic.runtime.errors import ArgumentError
from sonic.runtime.route import Route, RouteTensors


class TopKRouter(Router):
    """``logits = x @ weight.T``, the ``top_k`` best columns, and their weights.

    Columns are the E experts, then identity experts (weight times the token itself), then null
    experts (nothing; their winners are not renormalised over). See
    :func:`sonic.routing.route.route` for what is computed.

    Args:
        hidden_size: H. num_experts: E. top_k: winners per token.
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``.
        renormalize: weights of a token sum to ``scale``.
        scale: factor of the weights.
        correction_bias: whether there is a ``correction_bias`` (C,), a float32 buffer that moves
            the choice but not the weights, and that :func:`update_balance` adjusts.
        num_groups, topk_groups, group_best: winners come from the ``topk_groups`` best of
            ``num_groups`` runs of columns, ranked by the sum of their ``group_best`` best choices.
        num_identity, num_null: experts that cost nothing.
        losses: factors of the balancing losses, a :class:`LossWeights` or a mapping.
        capacity_factor: in training an expert takes at most ``factor * T * top_k / E`` rows,
            rounded up, so that any factor leaves it one; None for no limit.
            eval_capacity_factor: likewise in eval mode.
        capacity_drop: ``"position"`` drops an expert's last tokens, ``"score"`` its least weighted.
        group: processes that share a batch, for the global-batch loss in training and for
            :func:`update_balance`; None for this process alone. With that loss a forward in
            training is collective: all processes of the group have to run it. In eval mode nothing
            is exchanged, and the loss is that of this process's own pass.
        add_bias: whether the product has a learned ``bias`` (C,) (gpt-oss).
        float32_logits: evaluate the product in float32, whatever the weight's dtype.
        std: standard deviation of the normal initialisation.
        device, dtype: of the parameters.

    Parameters: ``weight`` (C, H), ``bias`` (C,) or None.

    Activation checkpointing, eager or compiled: a repeated pass is not counted and has the loads of
    its first run in the global-batch loss, whatever the order of backward passes, provided that
    these come before :func:`update_balance`. Reentrant checkpointing, and any of compiled passes,
    knows the last 256 passes again (fewer above 8192 columns), by their loads and probabilities, in
    4 KiB for each column; of identical micro-batches it may exchange the loads. Any forward that
    runs inside a backward pass, in a hook for instance, is taken for a repetition and not counted.
    """

    bias: nn.Parameter | None
    correction_bias: Tensor | None
    step_load: Tensor | None
    batch_load: Tensor | None
    _earlier_loads: EarlierLoads | None
    _factors: tuple[float | None, float | None]
    _ratios: tuple[tuple[int, int] | None, tuple[int, int] | None]

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        correction_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_best: int = 2,
        num_identity: int = 0,
        num_null: int = 0,
        losses: LossWeights | Mapping[str, float] | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        capacity_drop: str = "position",
        group: dist.ProcessGroup | None = None,
        add_bias: bool = False,
        float32_logits: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = type(self).__name__
        checks.check_num_experts(op, "num_experts", num_experts)
        for name, value in (("num_identity", num_identity), ("num_null", num_null)):
            checks.check_int(op, name, value, 0, checks.MAX_EXPERTS, "16-bit ids")
        columns = num_experts + num_identity + num_null
        super().__init__(hidden_size, num_experts, top_k, num_columns=columns, losses=losses)
        checks.check_bools(
            op,
            renormalize=renormalize,
            correction_bias=correction_bias,
            add_bias=add_bias,
            float32_logits=float32_logits,
        )
        checks.check_parameters(op, std, device, dtype)
        check_group(op, group)
        checks.check_known(op, "capacity_drop", capacity_drop, DROP_RULES)
        self.num_columns = columns
        self.num_identity = num_identity
        self.num_null = num_null
        self._factors, self._ratios = (None, None), (None, None)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity_drop = capacity_drop
        self.float32_logits = float32_logits
        self.std = std
        self._options: dict[str, Any] = {
            "score": score,
            "renormalize": renormalize,
            "scale": scale,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_best": group_best,
            "num_null": num_null,
        }
        self._check_options()
        self._group = SharedReference(group)
        self.weight = nn.Parameter(torch.empty(columns, hidden_size, device=device, dtype=dtype))
        if add_bias:
            self.bias = nn.Parameter(torch.empty(columns, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        bias = torch.empty(columns, dtype=torch.float32, device=device) if correction_bias else None
        self.register_buffer("correction_bias", bias)
        # No buffers: DistributedDataParallel would replace them by those of its first process.
        self.step_load = self.batch_load = self._earlier_loads = None
        self._start_counts(self.weight.device)
        self.reset_parameters()

    def _check_options(self) -> None:
        """Refuse at construction what :func:`route` would refuse at the first call."""
        came = f"num_experts={self.num_experts}"
        if self.num_columns != self.num_experts:
            came += f", num_identity={self.num_identity} and num_null={self.num_null}"
        options = Route(
            top_k=self.top_k,
            num_working=self.num_columns - self.num_null,
            num_experts=self.num_experts,
            num_sequences=1,
            balance=True,
            **{name: value for name, value in self._options.items() if name != "num_null"},
        )
        check_options(type(self).__name__, came, 0, self.num_columns, options)

    def reset_parameters(self) -> None:
        """N(0, std) weight, zero biases and counts; also after ``to_empty`` on a meta module."""
        nn.init.normal_(self.weight, std=self.std)
        for tensor in (self.bias, self.correction_bias):
            if tensor is not None:
                nn.init.zeros_(tensor)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Forget the passes since the last :func:`update_balance`, as after warming a graph up."""
        for tensor in (self.step_load, self.batch_load):
            if tensor is not None:
                tensor.zero_()
        if self._earlier_loads is not None:
            self._earlier_loads.clear()

    def _start_counts(self, device: torch.device) -> None:
        """Counts of no pass, on ``device``."""
        if self.correction_bias is not None:
            self.step_load = torch.zeros(self.num_columns, dtype=torch.int64, device=device)
        if self.losses.global_batch:
            self.batch_load = torch.zeros(self.num_columns + 1, dtype=torch.int64, device=device)
            self._earlier_loads = EarlierLoads(self.batch_load)

    def _counts_are_elsewhere(self, device: torch.device) -> bool:
        counts = self.batch_load if self.step_load is None else self.step_load
        return counts is not None and counts.device != device

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Counts are not part of a checkpoint, and those of other weights are none of these."""
        super()._load_from_state_dict(*arguments)
        if self._counts_are_elsewhere(self.weight.device):  # weights were assigned
            self._start_counts(self.weight.device)
        self.reset_counts()

    @property
    def capacity_factor(self) -> float | None:
        """Of training; may be assigned."""
        return self._factors[0]

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        self._ratios = self._ratio("capacity_factor", factor), self._ratios[1]
        self._factors = factor, self._factors[1]

    @property
    def eval_capacity_factor(self) -> float | None:
        """Of eval mode; may be assigned."""
        return self._factors[1]

    @eval_capacity_factor.setter
    def eval_capacity_factor(self, factor: float | None) -> None:
        self._ratios = self._ratios[0], self._ratio("eval_capacity_factor", factor)
        self._factors = self._factors[0], factor

    def _ratio(self, name: str, factor: float | None) -> tuple[int, int] | None:
        """Found once, and where nothing is traced: torch.compile knows no exact fractions."""
        if factor is None:
            return None
        check_factor(type(self).__name__, name, factor)
        return exact_ratio(factor)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that share a batch; may be assigned."""
        group: dist.ProcessGroup | None = self._group.value
        return group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        check_group(type(self).__name__, group)
        self._group = SharedReference(group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Casting the module leaves the correction bias in float32: its steps are small."""
        before = self.correction_bias
        super()._apply(fn, recurse)
        if self.step_load is not None:
            self.step_load = fn(self.step_load)
        if self.batch_load is not None:
            self.batch_load = fn(self.batch_load)
            self._earlier_loads = EarlierLoads(self.batch_load)
        after = self.correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.correction_bias = before.to(after.device)
        return self

    def compute_logits(self, tokens: Tensor) -> Tensor:
        """(T, C) from (T, H)."""
        return router_logits(tokens, self.weight, self.bias, in_float32=self.float32_logits)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        balance: bool = True,
    ) -> RouterOutput:
        """Route tokens.

        Args:
            hidden_states: (..., H). A tensor (B, n, H) holds B sequences, for a sequence-wise loss;
                without one they are so many tokens.
            mask: (T, C) or (C,) floating point, added to the logits: 0 leaves a column open, -inf
                bars it (modalities, padding). Of booleans that are True where allowed it is
                ``torch.where(allowed, 0.0, -torch.inf)``.
            ids: (T, top_k) recorded winners to weight anew, or None to choose.
            balance: False leaves losses and statistics out, and counts nothing.
        """
        tokens = self.tokens(hidden_states)
        logits = self.compute_logits(tokens)
        ratio = self._ratios[0 if self.training else 1]
        tensors = route(
            logits,
            self.top_k,
            bias=self.correction_bias,
            mask=mask,
            ids=ids,
            num_experts=None if ratio is not None else self.num_experts,
            num_sequences=num_sequences(hidden_states) if self.losses.sequence else 1,
            balance=balance,
            **self._options,
        )
        winners, plan = tensors.ids, plan_of(tensors)
        if ratio is not None:
            capacity = capacity_of_ratio(tokens.shape[0], self.top_k, self.num_experts, ratio)
            winners = limit_capacity(
                winners, tensors.scores, self.num_experts, capacity, drop=self.capacity_drop
            )
        if plan is None:
            plan = build_plan(winners, self.num_experts)
        statistics = None
        losses: dict[str, Tensor] = {}
        if balance:
            losses = self._losses(tensors)
            load = tensors.load[0]
            if tensors.load.shape[0] > 1:
                load = tensors.load.sum(dim=0, dtype=torch.int32)
            statistics = RoutingStatistics(load, tensors.entropy, self.num_experts, plan)
        return RouterOutput(
            winners,
            tensors.scores,
            plan,
            logits,
            losses,
            self.losses,
            statistics,
            self._identity_weight(tensors),
        )

    def _identity_weight(self, tensors: RouteTensors) -> Tensor | None:
        if self.num_identity == 0:
            return None
        first = self.num_experts
        is_identity = (tensors.ids >= first) & (tensors.ids < first + self.num_identity)
        return torch.where(is_identity, tensors.scores, 0.0).sum(dim=-1)

    def _losses(self, tensors: RouteTensors) -> dict[str, Tensor]:
        """The losses, and in training the counts that outlast this pass."""
        losses = {"switch": tensors.switch, "z": tensors.z}
        if self.losses.sequence:
            losses["sequence"] = tensors.sequence
        if self.training and self._counts_are_elsewhere(tensors.load.device):
            self._start_counts(tensors.load.device)  # the parameters were moved one by one
        if self.step_load is not None and self.training:
            count(self.step_load, tensors.load)
        if self.batch_load is not None:
            earlier = None
            if self.training and (passes := self._earlier_loads) is not None:
                load = local_load(tensors)
                earlier = earlier_load(self.batch_load, passes, load, tensors.prob_sum)
            losses["global_batch"] = global_batch_loss(
                tensors,
                top_k=self.top_k,
                num_null=self.num_null,
                group=self.group if self.training else None,
                earlier_load=earlier,
            )
        return losses

    def extra_repr(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self._options.items() if value != 1]
        if self.correction_bias is not None:
            shown.append("correction_bias=True")
        return ", ".join([super().extra_repr(), *shown])


@torch.no_grad()
def update_balance(module: nn.Module, rate: float = 1e-3) -> None:
    """Adjust every correction bias in ``module``; to be called once after each optimiser step.

    The loads counted in training since the last call are summed over the router's process group;
    each bias moves by ``rate`` against its expert's excess, and the counts start anew, those of the
    global-batch loss too. Forward passes alone never change a bias: not in eval mode, not when
    activation checkpointing repeats them, not when a CUDA graph is captured or replayed. Passes
    that warm a graph up are counted; call :meth:`TopKRouter.reset_counts` behind them.

    Args:
        module: a model, layer or router.
        rate: step of the bias, 0 or above.

    Raises:
        UnsupportedError: a CUDA graph is being captured.
    """
    op = "update_balance"
    if not isinstance(module, nn.Module):
        raise ArgumentError(
            checks.message(
                op,
                f"module is of type {type(module).__name__}",
                "a torch.nn.Module",
                "Pass the model, a layer or a router.",
            )
        )
    checks.check_number(op, "rate", rate, "1e-3 is usual.")
    routers = [router for router in module.modules() if isinstance(router, TopKRouter)]
    pending: dict[tuple[Any, torch.device], list[TopKRouter]] = {}
    for router in routers:
        for counts in (router.batch_load, router.step_load):
            if counts is not None:
                refuse_capture(op, counts)
        if router.step_load is not None:
            pending.setdefault((router.group, router.step_load.device), []).append(router)
    for (group, _), together in pending.items():
        # One exchange for all layers.
        loads = torch.cat([r.step_load for r in together if r.step_load is not None])
        all_reduced(loads, group)
        parts = loads.split([r.num_columns for r in together])
        for router, load in zip(together, parts, strict=True):
            if router.correction_bias is not None and router.step_load is not None:
                bias = corrected_bias(router.correction_bias, load, rate)
                router.correction_bias.copy_(bias)
    for router in routers:
        router.reset_counts()


def _refuse_fixed(op: str, options: Mapping[str, Any], **fixed: Any) -> None:
    """Refuse options that a named router decides itself."""
    for name, value in fixed.items():
        if name in options:
            raise ArgumentError(
                checks.message(
                    op,
                    f"{name}={options[name]!r} came, which this router sets to {value!r}",
                    f"the arguments of TopKRouter without {name}",
                    f"Leave {name} out, or use a TopKRouter.",
                )
            )


class SoftmaxRouter(TopKRouter):
    """Softmax and top-k in either order (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, DeepSeek-V2).

    ``renormalize=True`` is the softmax over the winners' logits, which is the same as keeping the
    winners of a full softmax and renormalising them; ``False`` keeps the full softmax's values.
    Other arguments: :class:`TopKRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = True,
        **options: Any,
    ) -> None:
        _refuse_fixed(type(self).__name__, options, score="softmax")
        super().__init__(
            hidden_size, num_experts, top_k, score="softmax", renormalize=renormalize, **options
        )


class SigmoidRouter(TopKRouter):
    """Sigmoid scores with a correction bias; groups and scale as given (DeepSeek-V3, MiniMax-M2).

    Arguments: :class:`TopKRouter`. DeepSeek-V3 itself is ``SigmoidRouter(7168, 256, 8, scale=2.5,
    num_groups=8, topk_groups=4, float32_logits=True)``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        correction_bias: bool = True,
        **options: Any,
    ) -> None:
        _refuse_fixed(type(self).__name__, options, score="sigmoid")
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            score="sigmoid",
            correction_bias=correction_bias,
            **options,
        )


class SqrtSoftplusRouter(TopKRouter):
    """``sqrt(softplus(logit))`` scores with a correction bias (DeepSeek-V4).

    Arguments: :class:`TopKRouter`. For its hash-routed layers pass the table's ids as ``ids``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        correction_bias: bool = True,
        **options: Any,
    ) -> None:
        _refuse_fixed(type(self).__name__, options, score="sqrt_softplus")
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            score="sqrt_softplus",
            correction_bias=correction_bias,
            **options,
        )


class Top1Router(TopKRouter):
    """One expert per token, weighted by its probability among all (Switch, arXiv 2101.03961).

    Renormalising a single winner would cut the router off from the gradient, so it is not offered.
    Other arguments: :class:`TopKRouter`.
    """

    def __init__(self, hidden_size: int, num_experts: int, **options: Any) -> None:
        _refuse_fixed(type(self).__name__, options, top_k=1, renormalize=False)
        super().__init__(hidden_size, num_experts, 1, renormalize=False, **options)


class NoisyTopKRouter(TopKRouter):
    """In training, logits plus normal noise of a learned spread, ``softplus(x @ noise.T)``.

    The noise is drawn in float32 and takes part in choice and weights; in eval mode there is none.
    Arguments: :class:`TopKRouter`.

    Parameters: those of :class:`TopKRouter`, and ``noise_weight`` (C, H), which starts at zero.

    Source: Shazeer et al. (arXiv 1701.06538), section 2.1.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "noise_weight"):
            nn.init.zeros_(self.noise_weight)

    def compute_logits(self, tokens: Tensor) -> Tensor:
        logits = super().compute_logits(tokens)
        if not self.training:
            return logits
        spread = F.softplus(router_logits(tokens, self.noise_weight, in_float32=True))
        return logits + torch.randn_like(spread) * spread
