"""Torch entry points of the router: scores, winners and rounded token counts from logits."""

# The function takes the place of the module of its name as an attribute of this package; from the
# module, import names: ``from sonic.routing.token_rounding import RULES``.
from sonic.routing.rounded_routing import rounded_routing
from sonic.routing.token_rounding import (
    max_pairs,
    rounding_scores,
    token_rounding,
    token_rounding_plan,
)
from sonic.routing.topk import topk_routing

__all__ = [
    "max_pairs",
    "rounded_routing",
    "rounding_scores",
    "token_rounding",
    "token_rounding_plan",
    "topk_routing",
]
