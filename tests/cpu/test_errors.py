"""Every refusal of the public functions, and that its text helps.

A text says what was asked and what came, what is allowed, and what to do. Each case below names a
piece of the first, of the second and of the third; tests of the modules' refusals are in test_nn.
"""

import importlib
import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch

import sonic
from sonic import plan, routing
from sonic.enums import ActivationType
from sonic.routing import balancing, topk
from sonic.routing.product_key import product_key_routing
from sonic.routing.route import route
from sonic.runtime import backend, launch, limits
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    LayoutError,
    MissingPackageError,
    ShapeError,
    SonicError,
    UnsupportedError,
)
from sonic.runtime.problem import up_problem

T, H, I, E, K = 5, 16, 8, 4, 2  # noqa: E741 (the names of sizes throughout)
LOW = torch.bfloat16


def experts(device="cpu", dtype=torch.float32, **changes):
    arguments = {
        "hidden_states": torch.zeros(T, H, dtype=dtype, device=device),
        "topk_ids": torch.zeros(T, K, dtype=torch.int32, device=device),
        "topk_weights": torch.zeros(T, K, device=device),
        "w1": torch.zeros(E, 2 * I, H, dtype=dtype, device=device),
        "w2": torch.zeros(E, H, I, dtype=dtype, device=device),
    }
    sonic.experts(**arguments | changes)


def kernels(**changes):
    """A call for the kernels. Meta tensors are checked like CUDA tensors, and run nothing."""
    experts("meta", LOW, **{"impl": "cute"} | changes)


def flat(**changes):
    arguments = {
        "hidden_states": torch.zeros(T, H),
        "token_ids": torch.zeros(7, dtype=torch.int32),
        "expert_ids": torch.zeros(7, dtype=torch.int32),
        "weights": torch.zeros(7),
        "w1": torch.zeros(E, 2 * I, H),
        "w2": torch.zeros(E, H, I),
    }
    sonic.experts_flat(**arguments | changes)


def moe(**changes):
    arguments = {
        "hidden_states": torch.zeros(T, H),
        "router_weight": torch.zeros(E, H),
        "w1": torch.zeros(E, 2 * I, H),
        "w2": torch.zeros(E, H, I),
        "top_k": K,
    }
    sonic.moe(**arguments | changes)


def grouped_mm(device="cpu", **changes):
    arguments = {
        "rows": torch.zeros(9, 16, device=device),
        "weight": torch.zeros(E, 8, 16, device=device),
        "offset_by_expert": torch.zeros(E + 1, dtype=torch.int32, device=device),
    }
    sonic.grouped_mm(**arguments | changes)


def upstream_topk(**changes):
    arguments = {
        "x": torch.zeros(T, H),
        "router_w": torch.zeros(E, H),
        "w1": torch.zeros(2 * I, H, E),
        "b1": None,
        "w2": torch.zeros(H, I, E),
        "b2": None,
        "K": K,
        "stream_id": 0,
    }
    sonic.moe_TC_softmax_topk_layer(**arguments | changes)


def upstream_general(**changes):
    ids = torch.zeros(7, dtype=torch.int32)
    arguments = {"x": torch.zeros(T, H), "router_scores": torch.zeros(7)}
    arguments |= {"token_indices": ids, "expert_indices": ids, "E": E, "stream_id": 0}
    arguments |= {"w1": torch.zeros(2 * I, H, E), "b1": None}
    arguments |= {"w2": torch.zeros(H, I, E), "b2": None}
    sonic.moe_general_routing_inputs(**arguments | changes)


def build_plan(**changes):
    sonic.build_plan(**{"topk_ids": z(T, K, dtype=torch.int32), "num_experts": E} | changes)


def build_plan_flat(**changes):
    ids = z(7, dtype=torch.int32)
    arguments = {"token_ids": ids, "expert_ids": ids, "num_tokens": T, "num_experts": E}
    sonic.build_plan_flat(**arguments | changes)


def topk_routing(**changes):
    sonic.topk_routing(**{"logits": z(T, E), "top_k": K} | changes)


def product_keys(**changes):
    product_key_routing(**{"logits": z(T, 2, 3), "top_k": K} | changes)


def token_rounding(**changes):
    sonic.token_rounding(**{"scores": z(T, E), "top_k": K, "tile": 2} | changes)


def max_pairs(**changes):
    arguments = {"num_tokens": T, "num_experts": E, "top_k": K, "tile": "auto", "rule": "nr"}
    routing.max_pairs(**arguments | changes)


def capacity_of(**changes):
    arguments = {"num_tokens": T, "top_k": K, "num_experts": E, "factor": 1.25}
    balancing.capacity_of(**arguments | changes)


def limit_capacity(**changes):
    ids = z(T, K, dtype=torch.int32)
    arguments = {"ids": ids, "scores": z(T, K), "num_experts": E, "capacity": 2}
    balancing.limit_capacity(**arguments | changes)


def corrected_bias(**changes):
    balancing.corrected_bias(**{"bias": z(E), "load": z(E), "rate": 1e-3} | changes)


def global_batch_loss(**changes):
    arguments = {"tensors": route(z(T, E), K), "top_k": K, "num_null": 0}
    balancing.global_batch_loss(**arguments | changes)


def statistics(**changes):
    arguments = {"load": z(E), "token_entropy": None, "num_experts": E, "plan": None}
    balancing.RoutingStatistics(**arguments | changes)


class Case(NamedTuple):
    name: str
    call: object
    changes: dict
    error: type
    came: str
    allowed: str
    todo: str


def z(*size, dtype=torch.float32, device="cpu"):
    return torch.zeros(size, dtype=dtype, device=device)


def m(*size, dtype=LOW):
    return torch.zeros(size, dtype=dtype, device="meta")


W1, W2 = (E, 2 * I, H), (E, H, I)
GRADS = z(*W1), z(*W2)
BOTH_GRADS = GRADS[0], GRADS[0].view(-1)[-E * H * I :].view(W2)
FLAT_META = {"hidden_states": m(T, H), "w1": m(*W1), "w2": m(*W2), "impl": "cute"}
CASES = [
    # hidden_states
    Case("no tensor", experts, {"hidden_states": [[1.0]]}, ArgumentError,
         "hidden_states is of type list", "a torch.Tensor", "torch.as_tensor"),
    Case("three axes", experts, {"hidden_states": z(1, T, H)}, ShapeError,
         "(1, 5, 16)", "2 axes, (T, H)", "reshape(-1"),
    Case("integer input", experts, {"hidden_states": z(T, H, dtype=torch.int32)}, DTypeError,
         "int32", "bfloat16, float16, float32, float64", ".float()"),
    Case("sparse input", experts, {"hidden_states": z(T, H).to_sparse()}, LayoutError,
         "torch.sparse_coo", "torch.strided", "to_dense"),
    # options
    Case("activation", experts, {"activation": "swish"}, ArgumentError,
         "activation='swish'", "'swiglu'", "sonic.ActivationType"),
    Case("layout", experts, {"layout": "blocked"}, ArgumentError,
         "layout='blocked'", "'interleaved', 'concatenated'", "sonic.GateUpLayout"),
    Case("score order", moe, {"score_order": "softmax"}, ArgumentError,
         "score_order='softmax'", "'topk_over_softmax_norm'", "sonic.ScoreOrder"),
    Case("impl", experts, {"impl": "triton"}, ArgumentError,
         "impl='triton'", "'auto', 'cute', 'reference'", 'impl="auto"'),
    # routing
    Case("ids rank", experts, {"topk_ids": z(T, dtype=torch.int32)}, ShapeError,
         "topk_ids has shape (5,)", "2 axes, (T, top_k)", "per token"),
    Case("ids dtype", experts, {"topk_ids": z(T, K)}, DTypeError,
         "topk_ids is float32", "int32, int64", "Pass indices"),
    Case("ids rows", experts, {"topk_ids": z(3, K, dtype=torch.int32)}, ShapeError,
         "3 rows for 5 tokens", "one row per token", "sonic.experts_flat"),
    Case("ids without columns", experts,
         {"topk_ids": z(T, 0, dtype=torch.int32), "topk_weights": z(T, 0)}, ArgumentError,
         "top_k (columns of topk_ids)=0", "1 to", "inside that range"),
    Case("weights shape", experts, {"topk_weights": z(T, E)}, ShapeError,
         "topk_weights has shape (5, 4)", "(5, 2)", "gather(1, topk_ids)"),
    Case("weights dtype", experts, {"topk_weights": z(T, K, dtype=torch.int64)}, DTypeError,
         "topk_weights is int64", "float32", ".float()"),
    Case("too many slots", experts,
         {"hidden_states": m(2**30, H), "topk_ids": m(2**30, K, dtype=torch.int32),
          "topk_weights": m(2**30, K), "w1": m(*W1), "w2": m(*W2)}, ShapeError,
         "2147483648 slots", "2147483647", "Split the tokens"),
    Case("too many rows for the kernels", kernels,
         {"hidden_states": m(2**29 + 1, H), "topk_ids": m(2**29 + 1, K, dtype=torch.int32),
          "topk_weights": m(2**29 + 1, K)}, ShapeError,
         '1073741826 slots (token-expert pairs) with impl="cute"', "at most 1073741824",
         'impl="reference"'),
    Case("too many rows for any implementation, with the kernels", kernels,
         {"hidden_states": m(2**30, H), "topk_ids": m(2**30, K, dtype=torch.int32),
          "topk_weights": m(2**30, K)}, ShapeError,
         "2147483648 slots", "at most 1073741824", "Split the tokens over several calls."),
    Case("too many flat slots for the kernels", flat, dict(
        FLAT_META, **dict.fromkeys(("token_ids", "expert_ids"), m(2**30 + 1, dtype=torch.int32)),
        weights=m(2**30 + 1)), ShapeError,
         "1073741825 slots", "at most 1073741824", "Split the tokens"),
    Case("too many winners for the kernels", moe,
         {"hidden_states": m(2**29 + 1, H), "router_weight": m(E, H), "w1": m(*W1), "w2": m(*W2),
          "impl": "cute"}, ShapeError,
         "1073741826 slots", "at most 1073741824", "Split the tokens"),
    Case("too many grouped rows for the kernels", grouped_mm,
         {"rows": m(2**30 + 1, 16), "weight": m(E, 8, 16), "impl": "cute",
          "offset_by_expert": m(E + 1, dtype=torch.int32)}, ShapeError,
         "1073741825 slots", "at most 1073741824", "Split the tokens"),
    Case("flat rank", flat, {"token_ids": z(7, 1, dtype=torch.int32)}, ShapeError,
         "token_ids has shape (7, 1)", "1 axes, (S)", "token_ids.reshape(-1)"),
    Case("flat dtype", flat, {"expert_ids": z(7)}, DTypeError,
         "expert_ids is float32", "int32, int64", "Pass indices"),
    Case("flat lengths", flat, {"weights": z(6)}, ShapeError,
         "7, 7 and 6 entries", "one length S", "same pairs"),
    Case("flat weights", flat, {"weights": z(7, dtype=torch.bool)}, DTypeError,
         "weights is bool", "float32", ".float()"),
    Case("router shape", moe, {"router_weight": z(H, E)}, ShapeError,
         "router_weight has shape (16, 4)", "(E=4, H=16)", "one row of router weights"),
    Case("router dtype", moe, {"router_weight": z(E, H, dtype=torch.int8)}, DTypeError,
         "router_weight is int8", "float32", "scales"),
    Case("top_k too large", moe, {"top_k": 5}, ArgumentError,
         "top_k=5 came with 4 experts", "1 to 4 (at most 64 and at most E=4)", "inside that range"),
    Case("top_k no int", moe, {"top_k": 2.0}, ArgumentError,
         "top_k=2.0 is of type float", "an int from 1 to 4", "Python int"),
    # weights
    Case("w1 rank", experts, {"w1": z(2 * I, H)}, ShapeError,
         "w1 has shape (16, 16)", "3 axes, (E, 2I or I, H)", "Stack the experts"),
    Case("w1 transposed", experts, {"w1": z(E, H, 2 * I + 2)}, ShapeError,
         "hidden size 18", "the H of hidden_states", "transpose(1, 2)"),
    Case("w1 odd", experts, {"w1": z(E, 2 * I + 1, H)}, ShapeError,
         "17 rows per expert", "an even number", "not gated"),
    Case("w2 rank", experts, {"w2": z(H, I)}, ShapeError,
         "w2 has shape (16, 8)", "3 axes, (E, H, I)", "Stack the experts"),
    Case("w2 for another activation", experts, {"activation": "relu"}, ShapeError,
         "w2 has shape (4, 16, 8)", "(E=4, H=16, I=16)", "not gated: w1 has I rows"),
    Case("no experts", experts, {"w1": z(0, 2 * I, H), "w2": z(0, H, I)}, ArgumentError,
         "number of experts=0", "1 to 65536", "inside that range"),
    Case("too many experts", kernels, {"w1": m(65537, 2 * I, H)}, ArgumentError,
         "65537", "1 to 65536", "inside that range"),
    Case("w1 dtype", experts, {"w1": z(*W1, dtype=LOW)}, DTypeError,
         "w1 is bfloat16 and hidden_states float32", "one dtype", "torch.autocast('cpu')"),
    Case("b1 shape", experts, {"b1": z(E, I)}, ShapeError,
         "b1 has shape (4, 8)", "(E=4, rows=16)", "one bias per row"),
    Case("b2 rank", experts, {"b2": z(H)}, ShapeError,
         "b2 has shape (16,)", "2 axes", "one bias per row"),
    Case("b2 dtype", experts, {"b2": z(E, H, dtype=torch.float64)}, DTypeError,
         "b2 is float64", "one dtype", "Cast one of them"),
    # devices
    Case("mixed devices", experts, {"w2": m(*W2, dtype=torch.float32)}, DeviceError,
         "w2 is on meta and hidden_states on cpu", "one device", "Move w2 to cpu"),
    Case("ids elsewhere", experts, {"topk_ids": m(T, K, dtype=torch.int32)}, DeviceError,
         "topk_ids is on meta", "one device", "Move topk_ids to cpu"),
    Case("kernels on a CPU", experts, {"impl": "cute"}, DeviceError,
         'impl="cute" was asked for a tensor on cpu', "CUDA tensors", 'impl="reference"'),
    # what only the kernels ask for
    Case("float32 kernels", kernels,
         {"hidden_states": m(T, H, dtype=torch.float32), "w1": m(*W1, dtype=torch.float32),
          "w2": m(*W2, dtype=torch.float32)}, DTypeError,
         'float32 with impl="cute"', "bfloat16, float16", 'impl="reference"'),
    Case("strided weight", kernels, {"w1": m(E, H, 2 * I).transpose(1, 2)}, LayoutError,
         "w1 has strides (256, 1, 16)", "contiguous", "w1.contiguous()"),
    Case("misaligned hidden size", kernels,
         {"hidden_states": m(T, 20), "w1": m(E, 2 * I, 20), "w2": m(E, 20, I)}, ShapeError,
         "hidden_size=20", "multiples of 8", "Pad it to 24"),
    Case("misaligned intermediate size", kernels, {"w1": m(E, 8, H), "w2": m(E, H, 4)}, ShapeError,
         "intermediate_size=4", "multiples of 8", 'impl="reference"'),
    # main gradients
    Case("main_grads no pair", experts, {"main_grads": z(*W1)}, ArgumentError,
         "main_grads is Tensor", "a pair (for w1, for w2)", "w1.main_grad"),
    Case("main_grads of three", experts, {"main_grads": (None, None, None)}, ArgumentError,
         "main_grads is tuple of 3", "a pair", "w2.main_grad"),
    Case("main_grads shape", experts, {"main_grads": (z(*W2), None)}, ShapeError,
         "main_grads for w1 has shape (4, 16, 8)", "(E=4, rows=16, columns=16)", "zeros_like(w1"),
    Case("main_grads dtype", experts, {"main_grads": (None, z(*W2, dtype=LOW))}, DTypeError,
         "main_grads for w2 is bfloat16", "float32", "dtype=torch.float32"),
    Case("main_grads strides", experts, {"main_grads": (None, z(E, I, H).transpose(1, 2))},
         LayoutError, "strides (128, 1, 16)", "contiguous accumulators", "torch.zeros(w2.shape"),
    Case("main_grads device", experts, {"main_grads": (m(*W1), None)}, DeviceError,
         "main_grads for w1 is on meta", "one device", "to cpu"),
    Case("main_grads leaf", experts, {"main_grads": (z(*W1).requires_grad_(), None)},
         ArgumentError, "requires a gradient", "plain accumulators", "detached"),
    Case("main_grads of one memory", experts, {"main_grads": BOTH_GRADS}, ArgumentError,
         "main_grads for w1 and main_grads for w2 share memory", "apart", "torch.zeros_like"),
    Case("main_grads in the weight", experts, {"main_grads": (None, GRADS[1]), "w2": GRADS[1]},
         ArgumentError, "main_grads for w2 and w2 share memory", "apart", "torch.zeros_like"),
    # grouped_mm
    Case("rows rank", grouped_mm, {"rows": z(9)}, ShapeError,
         "rows has shape (9,)", "2 axes, (R, K)", "one row per routed token"),
    Case("rows dtype", grouped_mm, {"rows": z(9, 16, dtype=torch.int64)}, DTypeError,
         "rows is int64", "bfloat16", "rows.float()"),
    Case("weight rank", grouped_mm, {"weight": z(8, 16)}, ShapeError,
         "weight has shape (8, 16)", "3 axes, (E, N, K)", "Stack the experts"),
    Case("reduction sizes", grouped_mm, {"weight": z(E, 16, 8)}, ShapeError,
         "rows has 16 columns and weight 8", "one K", "transpose(1, 2)"),
    Case("offset dtype", grouped_mm, {"offset_by_expert": z(E + 1, dtype=torch.int64)}, DTypeError,
         "offset_by_expert is int64", "int32", "offset_by_expert.int()"),
    Case("offset length", grouped_mm, {"offset_by_expert": z(E, dtype=torch.int32)}, ShapeError,
         "offset_by_expert has shape (4,)", "(E + 1=5)", "F.pad"),
    Case("bias shape", grouped_mm, {"bias": z(E, 16)}, ShapeError,
         "bias has shape (4, 16)", "(E=4, N=8)", "or None"),
    Case("misaligned reduction", grouped_mm,
         {"rows": m(9, 12), "weight": m(E, 8, 12), "impl": "cute",
          "offset_by_expert": m(E + 1, dtype=torch.int32)}, ShapeError,
         "the reduction size K=12", "multiples of 8", "Pad it to 16"),
    # plans and top-k
    Case("plan rank", build_plan, {"topk_ids": z(T, dtype=torch.int32)}, ShapeError,
         "topk_ids has shape (5,)", "(T, top_k)", "build_plan_flat"),
    Case("plan without columns", build_plan, {"topk_ids": z(T, 0, dtype=torch.int32)}, ShapeError,
         "topk_ids has shape (5, 0)", "top_k of at least 1", "one row of expert ids"),
    Case("plan dtype", build_plan, {"topk_ids": z(T, K)}, DTypeError,
         "topk_ids is float32", "int32, int64", "Pass indices"),
    Case("plan experts", build_plan, {"num_experts": 65537}, ArgumentError,
         "num_experts=65537", "1 to 65536", "of the layer"),
    Case("plan impl", build_plan, {"impl": "cute"}, ArgumentError,
         "impl='cute'", "'auto', 'triton', 'torch'", 'impl="auto"'),
    Case("plan of too many slots", build_plan, {"topk_ids": m(2**30, 2, dtype=torch.int32)},
         ShapeError, "topk_ids has 2147483648 slots", "2147483647", "Split the tokens"),
    Case("flat plan shapes", build_plan_flat, {"expert_ids": z(6, dtype=torch.int32)}, ShapeError,
         "token_ids has shape (7,) and expert_ids (6,)", "one shape (S,)", "same pairs"),
    Case("flat plan devices", build_plan_flat, {"expert_ids": m(7, dtype=torch.int32)},
         DeviceError, "token_ids is on cpu and expert_ids on meta", "one device", "to cpu"),
    Case("flat plan tokens", build_plan_flat, {"num_tokens": -1}, ArgumentError,
         "num_tokens=-1", "0 to 2147483646", "number of rows"),
    Case("logits rank", topk_routing, {"logits": z(E)}, ShapeError,
         "logits has shape (4,)", "2 axes, (T, E)", "one row of logits per token"),
    Case("logits of three axes", topk_routing, {"logits": z(1, T, E)}, ShapeError,
         "logits has shape (1, 5, 4)", "2 axes, (T, E)", "logits.flatten(0, -2)"),
    Case("logits dtype", topk_routing, {"logits": z(T, E, dtype=torch.int32)}, DTypeError,
         "logits is int32", "bfloat16, float16, float32, float64", "logits.float()"),
    Case("logits of no expert", topk_routing, {"logits": z(T, 0)}, ShapeError,
         "0 experts", "1 to 65536", "one column"),
    Case("winners", topk_routing, {"top_k": 5}, ArgumentError,
         "top_k=5 came with 4 experts", "1 to 4 (at most 64 and at most E=4)", "inside that range"),
    Case("order", topk_routing, {"order": "softmax"}, ArgumentError,
         "order='softmax'", "'topk_over_softmax_norm'", "sonic.ScoreOrder"),
    # token rounding
    Case("one axis of scores", token_rounding, {"scores": z(E)}, ShapeError,
         "token_rounding: scores has shape (4,)", "(T, E)", "one row of scores per token"),
    Case("three axes of scores", token_rounding, {"scores": z(1, T, E)}, ShapeError,
         "scores has shape (1, 5, 4)", "(T, E)", "scores.flatten(0, -2)"),
    Case("scores of no expert", token_rounding, {"scores": z(T, 0)}, ShapeError,
         "0 experts", "1 to 65536", "one column of scores"),
    Case("scores dtype", token_rounding, {"scores": z(T, E, dtype=torch.int64)}, DTypeError,
         "scores is int64", "bfloat16, float16, float32, float64", "scores.float()"),
    Case("generator", token_rounding, {"generator": "x"}, ArgumentError,
         "generator is of type str", "a torch.Generator", "manual_seed"),
    Case("tile", token_rounding, {"tile": 0}, ArgumentError,
         "tile=0", 'an int from 1 to 2147483647, or "auto"', "the tile of the kernels"),
    Case("rule", token_rounding, {"rule": "zz"}, ArgumentError,
         "token_rounding: rule='zz'", "'balance-f'", "one of these strings"),
    Case("winners of rounding", token_rounding, {"top_k": 5}, ArgumentError,
         "top_k=5 came with 4 experts", "1 to 4 (at most 64", "inside that range"),
    Case("rounding of the layer", moe, {"rounding": "zz"}, ArgumentError,
         "moe: rounding='zz'", "'balance-f'", "one of these strings"),
    Case("tile of the layer", moe, {"rounding": "nr", "tile": "big"}, ArgumentError,
         "moe: tile='big'", '"auto"', "the tile of the kernels"),
    Case("tile of the layer without rounding", moe, {"tile": "garbage"}, ArgumentError,
         "moe: tile='garbage'", '"auto"', "the tile of the kernels"),
    Case("generator of the layer", moe, {"rounding": "nr", "generator": 3}, ArgumentError,
         "moe: generator is of type int", "a torch.Generator", "manual_seed"),
    Case("pairs of tokens", max_pairs, {"num_tokens": -1}, ArgumentError,
         "num_tokens=-1", "0 to 2147483647", "inside that range"),
    Case("pairs without experts", max_pairs, {"num_experts": 0}, ArgumentError,
         "num_experts=0", "1 to 65536", "inside that range"),
    Case("pairs of winners", max_pairs, {"top_k": 5}, ArgumentError,
         "max_pairs: top_k=5", "1 to 4", "inside that range"),
    Case("pairs of a rule", max_pairs, {"rule": "zz"}, ArgumentError,
         "max_pairs: rule='zz'", "'nr-s'", "one of these strings"),
    Case("pairs of a tile", max_pairs, {"tile": 0}, ArgumentError,
         "max_pairs: tile=0", '"auto"', "the tile of the kernels"),
    # balancing
    Case("capacity without experts", capacity_of, {"num_experts": 0}, ArgumentError,
         "num_experts=0", "1 to 65536", "inside that range"),
    Case("capacity of tokens", capacity_of, {"num_tokens": -1}, ArgumentError,
         "capacity_of: num_tokens=-1", "0 to", "inside that range"),
    Case("capacity factor", capacity_of, {"factor": float("inf")}, ArgumentError,
         "factor=inf", "a finite number above 0", "None where"),
    Case("capacity factor beyond all", capacity_of, {"factor": 1e300}, ArgumentError,
         "factor=1e+300", "at most 65536", "None where"),
    Case("product keys of a list", product_keys, {"logits": [[[0.0], [0.0]]]}, ArgumentError,
         "product_key_routing: logits is of type list", "a torch.Tensor", "torch.as_tensor"),
    Case("product keys axes", product_keys, {"logits": z(T, E)}, ShapeError,
         "logits has shape (5, 4)", "3 axes, (T, 2, n)", "logits.view"),
    Case("product keys halves", product_keys, {"logits": z(T, 3, 3)}, ShapeError,
         "logits has shape (5, 3, 3)", "n from 1 to 256", "logits.view"),
    Case("product keys dtype", product_keys, {"logits": z(T, 2, 3, dtype=torch.int32)}, DTypeError,
         "logits is int32", "bfloat16, float16", "logits.float()"),
    Case("product keys float winners", product_keys, {"top_k": 2.0}, ArgumentError,
         "top_k=2.0 is of type float", "an int from 1 to 3", "Python int"),
    Case("product keys text winners", product_keys, {"top_k": "2"}, ArgumentError,
         "top_k='2' is of type str", "an int from 1 to 3", "Python int"),
    Case("product keys true winners", product_keys, {"top_k": True}, ArgumentError,
         "top_k=True is of type bool", "an int from 1 to 3", "Python int"),
    Case("product keys winners", product_keys, {"top_k": 4}, ArgumentError,
         "top_k=4 came with 3 keys", "at most n=3", "inside that range"),
    Case("product keys flag", product_keys, {"renormalize": 1}, ArgumentError,
         "renormalize=1", "True or False", "Python bool"),
    Case("negative capacity", limit_capacity, {"capacity": -1}, ArgumentError,
         "capacity=-1", "0 to", "inside that range"),
    Case("capacity no int", limit_capacity, {"capacity": 1.5}, ArgumentError,
         "capacity=1.5 is of type float", "an int from 0", "Python int"),
    Case("capacity scores", limit_capacity, {"scores": z(T, 3)}, ShapeError,
         "scores has shape (5, 3)", "(T=5, top_k=2)", "one score per id"),
    Case("capacity ids", limit_capacity, {"ids": z(T, K)}, DTypeError,
         "ids is float32", "int32, int64", "Pass indices"),
    Case("capacity rule", limit_capacity, {"drop": "random"}, ArgumentError,
         "drop='random'", "'position', 'score'", "one of these strings"),
    Case("bias and load", corrected_bias, {"load": z(3)}, ShapeError,
         "load has shape (3,)", "(E=4)", "each expert"),
    Case("load by sequence", corrected_bias, {"load": z(2, E)}, ShapeError,
         "load has shape (2, 4)", "1 axes", "load.sum(dim=0)"),
    Case("rate", corrected_bias, {"rate": float("nan")}, ArgumentError,
         "rate=nan", "a finite number", "1e-3"),
    Case("loss of what is no pass", global_batch_loss, {"tensors": None}, ArgumentError,
         "tensors is NoneType", "with balance", "balance=True"),
    Case("loss of a pass without sums", global_batch_loss,
         {"tensors": route(z(T, E), K, balance=False)}, ArgumentError,
         "a pass with balance=False", "with balance", "balance=True"),
    Case("loss winners", global_batch_loss, {"top_k": 0}, ArgumentError,
         "global_batch_loss: top_k=0", "1 to 4", "inside that range"),
    Case("loss null experts", global_batch_loss, {"num_null": 4}, ArgumentError,
         "num_null=4", "0 to 3", "inside that range"),
    Case("loss group", global_batch_loss, {"group": "world"}, ArgumentError,
         "group is of type str", "ProcessGroup", "new_group"),
    Case("loss earlier", global_batch_loss, {"earlier_load": z(E)}, ShapeError,
         "earlier_load has shape (4,)", "(E + 1=5)", "local_load"),
    Case("statistics load", statistics, {"load": z(2, E)}, ShapeError,
         "load has shape (2, 4)", "1 axes", "over sequences"),
    Case("statistics experts", statistics, {"num_experts": 5}, ArgumentError,
         "num_experts=5", "1 to 4", "inside that range"),
    # names known to users
    Case("two flags for three orders", upstream_topk, {"norm_topk_probs": True}, ArgumentError,
         "norm_topk_probs=True", "is_softmax_over_topk=False", "Drop norm_topk_probs"),
    Case("w1 not stacked", upstream_topk, {"w1": z(2 * I, H)}, ShapeError,
         "w1 has shape (16, 16)", "3 axes, (2I or I, H, E)", "permute(1, 2, 0)"),
    Case("E contradicts the weights", upstream_general, {"E": 5}, ShapeError,
         "E=5 came with weights of 4 experts", "the last axis of w1", "E=w1.shape[-1]"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_text_says_what_came_what_is_allowed_and_what_to_do(case):
    with pytest.raises(case.error) as caught:
        case.call(**case.changes)
    text = str(caught.value)
    assert isinstance(caught.value, SonicError)
    problem, _, remainder = text.partition(". Allowed: ")
    assert case.came in problem
    assert case.allowed in remainder
    assert case.todo in remainder
    assert text.endswith(".") and remainder.count(". ") >= 1


@pytest.mark.parametrize(
    "call",
    [
        experts,
        kernels,
        flat,
        moe,
        grouped_mm,
        build_plan,
        build_plan_flat,
        topk_routing,
        product_keys,
        token_rounding,
        max_pairs,
        capacity_of,
        limit_capacity,
        corrected_bias,
        global_batch_loss,
        statistics,
        upstream_topk,
        upstream_general,
    ],
)
def test_the_unchanged_calls_are_accepted(call):
    """Without this, a case above could be refused for a reason of its own making."""
    call()


def test_accumulators_side_by_side_are_accepted():
    memory = z(E * 2 * I * H + E * H * I)
    experts(
        main_grads=tuple(
            p.view(s)
            for p, s in zip(memory.split([E * 2 * I * H, E * H * I]), (W1, W2), strict=True)
        )
    )


def test_as_many_rows_as_an_expert_may_have_are_accepted():
    """One statement of the limit: that of the descriptors, which a row more would leave."""
    rows, offsets = m(limits.MAX_KERNEL_ROWS, 16), m(E + 1, dtype=torch.int32)
    grouped_mm(rows=rows, weight=m(E, 8, 16), offset_by_expert=offsets, impl="cute")
    rows = m(limits.MAX_KERNEL_ROWS + 1, 16)
    grouped_mm(rows=rows, weight=m(E, 8, 16), offset_by_expert=offsets, impl="reference")
    pytest.importorskip("cutlass")
    from sonic.device.tensormap import RAGGED_EXTENT

    assert limits.MAX_KERNEL_ROWS == RAGGED_EXTENT


def test_cases_are_many_and_distinct():
    assert len({case.came for case in CASES}) >= 45


def test_errors_are_also_the_errors_python_programs_expect():
    for error, builtin in {
        ShapeError: ValueError,
        ArgumentError: ValueError,
        DTypeError: TypeError,
        DeviceError: ValueError,
        LayoutError: ValueError,
        MissingPackageError: ImportError,
        UnsupportedError: NotImplementedError,
    }.items():
        assert issubclass(error, builtin) and issubclass(error, SonicError)


def test_saved_bytes_wants_one_way_of_counting_rows():
    with pytest.raises(ArgumentError, match="top_k=2 and num_slots=9.*exactly one.*Pass top_k"):
        sonic.saved_bytes(T, H, I, E, 2, num_slots=9)


COUNTS = {"num_tokens": T, "hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K}


@pytest.mark.parametrize("function", [sonic.saved_bytes, sonic.memory_estimate])
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        *(({name: wrong}, ArgumentError) for name in COUNTS for wrong in (-1, 2.0, "2", True)),
        ({"hidden_size": 0}, ArgumentError),
        ({"activation": "foo"}, ArgumentError),
        ({"dtype": "bfloat16"}, DTypeError),
        ({"dtype": torch.int8}, DTypeError),
        ({"dtype": None}, DTypeError),
    ],
    ids=str,
)
def test_memory_formulas_refuse(function, changes, error):
    function(**COUNTS)
    (name,) = changes
    with pytest.raises(error, match=f"{function.__name__}: {name}=.*Allowed: .*Pass"):
        function(**{**COUNTS, **changes})


def test_saved_bytes_refuses_lists():
    with pytest.raises(ArgumentError, match="num_slots=-2"):
        sonic.saved_bytes(T, H, I, E, num_slots=-2)
    with pytest.raises(ArgumentError, match="top_k=None and num_slots=None.*exactly one"):
        sonic.saved_bytes(T, H, I, E)


@pytest.mark.parametrize("activation", ["foo", None, 3])
def test_is_glu_refuses(activation):
    assert sonic.is_glu("swiglu") and not sonic.is_glu(sonic.ActivationType.RELU)
    with pytest.raises(ArgumentError, match="is_glu: activation=.*'swiglu'.*Pass"):
        sonic.is_glu(activation)


IDS, LOGITS = torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, E)
COUNTED = {
    "topk_routing: top_k": lambda n: sonic.topk_routing(LOGITS, n),
    "token_rounding: top_k": lambda n: sonic.token_rounding(LOGITS, n, 4),
    "build_plan: num_experts": lambda n: sonic.build_plan(IDS, n),
    "build_plan_flat: num_experts": lambda n: sonic.build_plan_flat(IDS[:, 0], IDS[:, 0], T, n),
    "build_plan_flat: num_tokens": lambda n: sonic.build_plan_flat(IDS[:, 0], IDS[:, 0], n, E),
}
LOOKED_AT = {
    "topk_routing: logits": lambda x: sonic.topk_routing(x, K),
    "token_rounding: scores": lambda x: sonic.token_rounding(x, K, 4),
    "build_plan: topk_ids": lambda x: sonic.build_plan(x, E),
    "build_plan_flat: token_ids": lambda x: sonic.build_plan_flat(x, IDS[:, 0], T, E),
    "build_plan_flat: expert_ids": lambda x: sonic.build_plan_flat(IDS[:, 0], x, T, E),
}


@pytest.mark.parametrize("what", COUNTED)
@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_routing_refuses_what_is_no_int(what, value):
    with pytest.raises(ArgumentError, match=f"{what}={value!r} is of type.*Allowed: an int from"):
        COUNTED[what](value)


@pytest.mark.parametrize("what", LOOKED_AT)
@pytest.mark.parametrize("value", [None, [[1]], LOGITS.numpy()], ids=["None", "list", "array"])
def test_routing_refuses_what_is_no_tensor(what, value):
    with pytest.raises(ArgumentError, match=f"{what} is of type .*Allowed: a torch.Tensor"):
        LOOKED_AT[what](value)


def test_advice_can_be_followed():
    w1 = torch.zeros(*W1)
    for weight, says in (
        (w1.to(torch.int8), "w1 is int8.*quantised.*scales"),
        (w1.to(torch.complex64), r"w1 is complex64.*w1\.real"),
    ):
        with pytest.raises(DTypeError, match=says) as caught:
            experts(w1=weight)
        assert "autocast" not in str(caught.value)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DTypeError) as caught:
        experts(hidden_states=torch.zeros(T, H, dtype=torch.float64))
    assert "autocast" not in str(caught.value)
    assert "hidden_states.to(torch.float32)" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"of type Linear.*router_weight=module\.weight"):
        moe(router_weight=torch.nn.Linear(H, E))
    for ids in (torch.zeros(T, K), torch.zeros(T, K, dtype=torch.bool)):
        with pytest.raises(DTypeError, match="topk_ids is (float32|bool).*Pass indices"):
            experts(topk_ids=ids)


def test_names_known_to_users_are_used_in_their_errors():
    w1, w2 = torch.zeros(*W1).permute(1, 2, 0), torch.zeros(*W2).permute(1, 2, 0)
    x, router, ids = torch.zeros(T, H), torch.zeros(E, H), torch.zeros(T, dtype=torch.int32)
    layer = {"x": x, "router_w": router, "w1": w1, "b1": None, "w2": w2, "b2": None, "K": K}
    flat = {"x": x, "router_scores": torch.zeros(T), "token_indices": ids, "expert_indices": ids}
    flat |= {"w1": w1, "b1": None, "w2": w2, "b2": None, "E": E}
    for function, arguments, changes, says in (
        (sonic.moe_TC_softmax_topk_layer, layer, {"K": 9}, "K=9"),
        (sonic.moe_TC_softmax_topk_layer, layer, {"x": x[None]}, "x has shape"),
        (sonic.moe_TC_softmax_topk_layer, layer, {"router_w": router[:2]}, "router_w has shape"),
        (sonic.moe_TC_softmax_topk_layer, layer, {"w2": w2[:, 1:]}, r"w2 .*W.permute\(1, 2, 0\)"),
        (
            sonic.moe_TC_softmax_topk_layer,
            layer,
            {"activation_type": "foo"},
            "activation_type='foo'",
        ),
        (sonic.moe_general_routing_inputs, flat, {"x": x[None]}, "x has shape"),
        (sonic.moe_general_routing_inputs, flat, {"token_indices": x}, "token_indices has shape"),
        (sonic.moe_general_routing_inputs, flat, {"router_scores": ids}, "router_scores is int32"),
    ):
        function(**arguments)
        with pytest.raises(SonicError, match=f"^{function.__name__}: .*{says}") as caught:
            function(**{**arguments, **changes})
        text = str(caught.value)
        assert not any(name in text for name in ("hidden_states", "router_weight", "top_k", "_ids"))


def test_plans_compare_by_identity():
    first, second = (sonic.build_plan(IDS, E) for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2


# --------------------------------------------------- what only a GPU or an installation tells


def test_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(backend, "_arch_of_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA A100")
    with pytest.raises(UnsupportedError, match='A100.*8.0.*9.0.*impl="reference"'):
        backend.backend_for(torch.device("cuda", 0))
    assert not sonic.is_available("cuda:0")
    assert "A100" in sonic.is_available("cuda:0").reason


def test_each_gpu_gets_the_tiles_of_its_kind(monkeypatch):
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    monkeypatch.setattr(backend, "_arch_of_device", lambda index: backend.Arch.SM90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[_index(device)])
    monkeypatch.setattr(launch, "_tuned", lambda backend, device: {})
    backend._for_device.cache_clear()
    launch._config.cache_clear()
    up = up_problem(ActivationType.SWIGLU, "bfloat16", False, True)
    devices = [torch.device("cuda", index) for index in range(2)]
    try:
        assert [backend.backend_for(device).gpu for device in devices] == ["H100", "H200"]
        tiles = [launch.config_for(up, device, 262_144, 128, 2048, 4096) for device in devices]
        assert tiles[0].dynamic and not tiles[1].dynamic
    finally:
        backend._for_device.cache_clear()
        launch._config.cache_clear()


def _index(device):
    return device if isinstance(device, int) else torch.device(device).index


def test_gpu_whose_kernels_are_not_in_this_release(monkeypatch):
    monkeypatch.setattr(backend, "_arch_of_device", lambda index: backend.Arch.SM120)
    if backend.Arch.SM120 in backend._READY:
        pytest.skip("every architecture has kernels")
    with pytest.raises(UnsupportedError, match='sm120.*ready: sm.*impl="reference"'):
        backend.backend_for(torch.device("cuda", 0))


@pytest.mark.parametrize("package", ["cutlass", "triton", "tvm_ffi"])
def test_missing_package(monkeypatch, package):
    find = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name == package else find("ast")

    monkeypatch.setattr(backend.importlib.util, "find_spec", find_spec)
    backend.load_backend.cache_clear()
    with pytest.raises(MissingPackageError, match='not installed.*pip install.*impl="reference"'):
        backend.load_backend(backend.Arch.SM90)
    backend.load_backend.cache_clear()


@pytest.mark.parametrize("package", ["triton", "tvm_ffi"])
def test_package_that_is_there_but_broken(monkeypatch, package):
    importing = importlib.import_module

    def import_module(name, *rest):
        if name == package:
            raise ImportError(f"{name}: undefined symbol: _ZN4core")
        return importing(name, *rest)

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: importing("ast").__spec__)
    monkeypatch.setattr(backend.importlib, "import_module", import_module)
    backend.load_backend.cache_clear()
    with pytest.raises(MissingPackageError, match="undefined symbol.*Reinstall") as caught:
        backend.load_backend(backend.Arch.SM90)
    assert isinstance(caught.value.__cause__, ImportError)
    backend.load_backend.cache_clear()


def test_routing_with_a_broken_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # "import of triton halted"
    for name in [name for name in sys.modules if name.startswith("sonic.triton")]:
        monkeypatch.delitem(sys.modules, name)
    plan._load_triton_plan.cache_clear()
    for forward, arguments in (
        (topk._forward_cuda, (torch.zeros(2, 4), 2, "softmax_over_topk")),
        (plan._plan_rows, (torch.zeros(4, dtype=torch.int32), None, 2, 2, 2, "triton")),
    ):
        with pytest.raises(MissingPackageError, match=r"triton, which cannot be imported \(import"):
            forward(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answers where there is no GPU")
@pytest.mark.parametrize("device", [None, "cuda", "cuda:3", torch.device("cuda", 0), 3, 0])
def test_availability_without_a_gpu(device):
    answer = sonic.is_available(device)
    assert not answer and "torch sees no CUDA device" in answer.reason
    assert ', or pass impl="reference"' in answer.reason


@pytest.mark.parametrize("device", ["banana", -1, 1.5, True, "cuda:x", [0]])
def test_availability_of_what_is_no_device(device):
    with pytest.raises(ArgumentError, match="names no device. Allowed: .*Pass"):
        sonic.is_available(device)


def test_availability_of_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    answer = sonic.is_available("cuda:5")
    says = "no cuda:5: torch sees 2. Allowed: cuda:0 to cuda:1. Choose one of these"
    assert not answer and says in answer.reason


def test_device_that_no_implementation_knows():
    with pytest.raises(DeviceError, match="is on xla:0.*Allowed: cuda, cpu.*Move"):
        from sonic import checks

        checks.resolve_impl("experts", "auto", torch.device("xla", 0))
