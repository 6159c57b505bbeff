"""Eager calls that leave the dispatcher and repeated checks out, and all that must not."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import sonic
from sonic import autograd, functional
from sonic.enums import ActivationType
from sonic.runtime import eager
from sonic.runtime.eager import needs_dispatcher, remembered
from sonic.runtime.errors import ArgumentError, DTypeError, ShapeError

T, H, I, E, TOP_K = 6, 16, 8, 3, 2  # noqa: E741


class _Subclass(Tensor):
    pass


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _layer(requires_grad: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).requires_grad_(requires_grad)

    ids = torch.randint(-1, E, (T, TOP_K), generator=generator)
    return {
        "hidden_states": normal(T, H),
        "topk_ids": ids,
        "topk_weights": normal(T, TOP_K),
        "w1": normal(E, 2 * I, H),
        "w2": normal(E, H, I),
        "b1": normal(E, 2 * I),
        "b2": normal(E, H),
    }


def _results(layer: dict[str, Tensor]) -> list[Tensor]:
    out = sonic.experts(**layer)
    leaves = [tensor for tensor in layer.values() if tensor.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


# --- past the dispatcher --------------------------------------------------------------------------


def test_plain_tensors_need_no_dispatcher() -> None:
    x = torch.zeros(2)
    assert not needs_dispatcher((x, torch.nn.Parameter(x), None, 3, "reference", True, [True]))
    with torch.no_grad():
        assert not needs_dispatcher((x,))
    with torch.inference_mode():
        assert not needs_dispatcher((x,))
    with torch.autocast("cpu"):
        assert not needs_dispatcher((x,))


def _forward_mode() -> bool:
    with forward_ad.dual_level():
        return needs_dispatcher((torch.zeros(2),))


def _mode(mode) -> bool:
    with mode:
        return needs_dispatcher((torch.zeros(2),))


def _inside(transform) -> bool:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(needs_dispatcher((x,)))
        return x.sum()

    transform(function)(torch.zeros(2, 3))
    return all(seen) and bool(seen)


def _traced() -> bool:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(needs_dispatcher((x,)))
        return x + 1

    torch.jit.trace(function, torch.zeros(2), check_trace=False)
    return seen[0]


@pytest.mark.parametrize(
    "is_needed",
    [
        lambda: needs_dispatcher((torch.zeros(2), torch.zeros(2).as_subclass(_Subclass))),
        lambda: needs_dispatcher((torch.zeros(2, device="meta"),)),
        lambda: needs_dispatcher((torch.zeros(2), object())),
        lambda: _mode(FakeTensorMode()),
        lambda: _mode(FlopCounterMode(display=False)),
        lambda: _mode(profile()),
        lambda: _mode(_FunctionMode()),
        lambda: _inside(torch.vmap),
        lambda: _inside(torch.func.grad),
        _forward_mode,
        _traced,
    ],
    ids=[
        "subclass", "meta", "other type", "fake", "flop counter", "profiler", "function mode",
        "vmap", "func.grad", "forward mode", "jit.trace",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whoever_looks_gets_the_dispatcher(is_needed) -> None:
    assert is_needed()


def test_a_torch_that_cannot_tell_gets_the_dispatcher(monkeypatch) -> None:
    monkeypatch.setattr(eager, "_KNOWN", False)
    assert needs_dispatcher((torch.zeros(2),))
    monkeypatch.delattr(torch._C, "_is_any_autocast_enabled")
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert eager.autocast_may_be_on() and eager.saved_tensors_are_hooked()
    _results(_layer())


def test_results_are_those_of_the_operators(monkeypatch) -> None:
    layer = _layer()
    direct = _results(layer)
    calls = []

    def counting(inputs) -> bool:
        calls.append(len(inputs))
        return True

    for module in (autograd, functional, sonic.plan):
        monkeypatch.setattr(module, "needs_dispatcher", counting)
    by_operator = _results(layer)
    assert len(calls) >= 4
    for ours, theirs in zip(direct, by_operator, strict=True):
        assert torch.equal(ours, theirs)


def test_a_default_device_needs_no_dispatcher_and_changes_nothing() -> None:
    layer = _layer()
    expected = _results(layer)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta and not needs_dispatcher((layer["w1"],))
        found = _results(layer)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", ["hidden_states", "w1", "w2", "b1", "b2", "topk_weights"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    layer = _layer()
    everything = dict(zip([n for n in layer if n != "topk_ids"], _results(layer)[1:], strict=True))
    layer[frozen] = layer[frozen].detach()
    out = sonic.experts(**layer)
    out.backward(torch.ones_like(out))
    for name, gradient in everything.items():
        actual = layer[name].grad
        assert actual is None if name == frozen else torch.equal(actual, gradient)


def test_no_rows_give_zero_gradients_and_none_without_biases() -> None:
    layer = _layer()
    layer |= {"hidden_states": torch.zeros(0, H).requires_grad_(), "b1": None, "b2": None}
    layer |= {"topk_ids": torch.zeros(0, TOP_K, dtype=torch.int32)}
    layer |= {"topk_weights": torch.zeros(0, TOP_K)}
    main_grads = (torch.ones(E, 2 * I, H), None)
    out = sonic.experts(**layer, main_grads=main_grads)
    out.sum().backward()
    assert layer["hidden_states"].grad.shape == (0, H)
    assert layer["w1"].grad is None and torch.equal(main_grads[0], torch.ones(E, 2 * I, H))
    assert not layer["w2"].grad.any()


def test_a_profile_names_the_operators() -> None:
    layer = _layer()
    with profile() as recorded:
        _results(layer)
    names = {event.key for event in recorded.key_averages()}
    assert {"sonic::build_plan", "sonic::experts_forward", "sonic::experts_backward"} <= names


def test_second_derivatives_are_still_refused() -> None:
    layer = _layer()
    out = sonic.experts(**layer)
    (gradient,) = torch.autograd.grad(out.sum(), layer["w2"], create_graph=True)
    with pytest.raises(sonic.UnsupportedError, match="second derivative"):
        gradient.sum().backward()


# --- remembered checks ----------------------------------------------------------------------------


def test_what_has_passed_is_not_checked_again(monkeypatch) -> None:
    layer = _layer()
    sonic.experts(**layer)

    def check(*_: object) -> None:
        raise AssertionError("checked again")

    for name in ("check_hidden_states", "check_topk", "check_weights"):
        monkeypatch.setattr(functional.checks, name, check)
    sonic.experts(**layer)
    with pytest.raises(AssertionError, match="checked again"):
        sonic.experts(**layer | {"hidden_states": torch.zeros(T, H).t().contiguous().t()})


def test_mistakes_are_found_after_right_calls() -> None:
    layer = _layer()
    sonic.experts(**layer)
    for _ in range(2):
        with pytest.raises(ShapeError, match="topk_ids has 5 rows for 6 tokens"):
            sonic.experts(**layer | {"topk_ids": layer["topk_ids"][:-1]})
        with pytest.raises(DTypeError, match="w2 is float64"):
            sonic.experts(**layer | {"w2": layer["w2"].double()})
        with pytest.raises(ArgumentError, match="activation='swigly'"):
            sonic.experts(**layer, activation="swigly")
        with pytest.raises(ArgumentError, match="impl=True is not known"):
            sonic.experts(**layer, impl=True)
        with pytest.raises(ArgumentError, match=r"layout=\[\]"):
            sonic.experts(**layer, layout=[])
        with pytest.raises(sonic.LayoutError, match="w1 has layout torch.sparse_coo"):
            sonic.experts(**layer | {"w1": layer["w1"].to_sparse()})
    sonic.experts(**layer)


def test_looks_are_told_apart() -> None:
    calls = []

    @remembered
    def look_at(*arguments: object) -> int:
        calls.append(arguments)
        return len(calls)

    x = torch.zeros(4, 6)
    looks = [
        x,
        torch.zeros(6, 4),
        x.t().contiguous().t(),
        x.half(),
        x.to("meta"),
        None,
        1,
        True,
        1.0,
        "1",
        ActivationType.SWIGLU,
        ActivationType.SWIGLU.value,
    ]
    for number, look in enumerate(looks, 1):
        assert look_at(look) == number
    assert [look_at(look) for look in looks] == list(range(1, len(looks) + 1))
    assert look_at(torch.ones(4, 6)) == 1, "values do not matter"
    assert look_at(torch.nn.Parameter(torch.ones(4, 6))) == 1
    for unclear in (x.as_subclass(_Subclass), x.to_sparse(), [x]):
        assert look_at(unclear) != look_at(unclear)


def test_what_is_remembered_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(eager, "_REMEMBERED", 4)
    calls = []

    @remembered
    def look_at(number: int) -> int:
        calls.append(number)
        return number

    assert [look_at(number) for number in range(10)] == list(range(10))
    assert look_at(9) == 9 and calls == list(range(10))
    assert look_at(0) == 0 and calls == [*range(10), 0]
