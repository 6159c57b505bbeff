"""Torch entry points of the router: scores and winners from logits."""
