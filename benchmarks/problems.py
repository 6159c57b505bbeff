"""Layers to compare on: the bars' sizes, random sizes, and skewed routings."""

import math
import random
from dataclasses import replace

import torch

from benchmarks.layer import Layer
from benchmarks.shapes import Shape

SKEWS = ("none", "zipf", "hot")
HOT_SHARE = 0.25
# Weights, their gradients, a second order of w1, and four copies of the largest operands of a GEMM
# while a peer tunes itself.
_RANDOM_WEIGHT_BYTES = 12 * 2**30
_RANDOM_ROW_BYTES = 6 * 2**30
_RANDOM_FLOPS = 4e13


def random_shapes(count: int, seed: int) -> list[Shape]:
    """Sizes drawn log-uniformly: T 1024-32768, H 1024-8192, I 128-4096, E 8-512, top_k 1-16; those
    that need more memory or time than a comparison has are drawn again."""
    rng = random.Random(seed)

    def draw(low: int, high: int, multiple: int) -> int:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(round(value / multiple) * multiple, low), high)

    shapes: list[Shape] = []
    while len(shapes) < count:
        shape = Shape(
            T=draw(1024, 32768, 256),
            H=draw(1024, 8192, 64),
            I=draw(128, 4096, 64),
            E=draw(8, 512, 8),
            top_k=rng.randint(1, 16),
        )
        if shape.top_k <= shape.E and _affordable(shape):
            shapes.append(shape)
    return shapes


def _affordable(shape: Shape) -> bool:
    weights = 2 * 3 * shape.E * shape.H * shape.I
    rows = 2 * shape.rows * (shape.H + 4 * shape.I)
    flops = shape.forward_flops(gated=True) + shape.backward_flops(gated=True)
    return weights <= _RANDOM_WEIGHT_BYTES and rows <= _RANDOM_ROW_BYTES and flops <= _RANDOM_FLOPS


def skewed_ids(shape: Shape, skew: str, generator: torch.Generator) -> torch.Tensor:
    """Expert ids (T, top_k) int32 on the generator's device.

    ``zipf``: distinct experts of a token, drawn with probabilities proportional to 1 / rank (the
    ranks are shuffled over the ids). ``hot``: uniform, then a random quarter of all slots goes to
    one expert, so that a token may name it more than once.
    """
    device = generator.device
    if skew not in ("zipf", "hot"):
        raise ValueError(f"no skew {skew!r}; there are {', '.join(SKEWS[1:])}")
    noise = torch.rand(shape.T, shape.E, generator=generator, device=device)
    keys = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))  # Gumbel: top-k is a draw without
    if skew == "zipf":  # replacement
        ranks = 1 + torch.randperm(shape.E, generator=generator, device=device)
        keys -= torch.log(ranks)
    ids = keys.topk(shape.top_k, dim=1).indices.int()
    if skew == "hot":
        slots = torch.rand(ids.shape, generator=generator, device=device)
        ids[slots < HOT_SHARE] = shape.E // 2
    return ids


def with_skew(layer: Layer, skew: str) -> Layer:
    """``layer`` with other ids, and the weights it had."""
    if skew == "none":
        return layer
    generator = torch.Generator(device=layer.options.device).manual_seed(layer.options.seed)
    return replace(layer, topk_ids=skewed_ids(layer.shape, skew, generator))
