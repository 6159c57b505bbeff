"""Routers: modules that decide which experts a token visits, and with what weight.

Each takes hidden states and returns a :class:`RouterOutput`, which :class:`sonic.MoE` accepts
through its ``router`` argument and :func:`sonic.experts` through ids and weights.

======================  ==============================================================
:class:`SoftmaxRouter`  top-k and softmax in either order, renormalised or not
:class:`SigmoidRouter`  sigmoid scores, correction bias, scale, groups (DeepSeek-V3)
:class:`SqrtSoftplusRouter`  root of softplus, correction bias (DeepSeek-V4)
:class:`Top1Router`     one expert, weighted by its probability (Switch)
:class:`NoisyTopKRouter`  learned noise on the logits in training (Shazeer et al.)
:class:`ProductKeyRouter`  n^2 experts from 2n keys
:class:`PrecomputedRouter`  ids and weights decided elsewhere
:class:`TopKRouter`     all of the above that choose by one matrix, with every option
:class:`SharedExperts`  the dense branch beside the routed experts
======================  ==============================================================
"""

from sonic.nn.routers.base import LossWeights, Router, RouterOutput
from sonic.nn.routers.precomputed import PrecomputedRouter
from sonic.nn.routers.product_key import ProductKeyRouter
from sonic.nn.routers.shared import SharedExperts
from sonic.nn.routers.topk import (
    NoisyTopKRouter,
    SigmoidRouter,
    SoftmaxRouter,
    SqrtSoftplusRouter,
    Top1Router,
    TopKRouter,
    update_balance,
)

__all__ = [
    "LossWeights",
    "NoisyTopKRouter",
    "PrecomputedRouter",
    "ProductKeyRouter",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SqrtSoftplusRouter",
    "Top1Router",
    "TopKRouter",
    "update_balance",
]
