"""Modules that own parameters: :class:`sonic.MoE` and :class:`sonic.Experts`."""

from sonic.nn.moe import ExpertLinear, Experts, MoE

__all__ = ["ExpertLinear", "Experts", "MoE"]
