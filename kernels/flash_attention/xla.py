"""Placeholder."""

from kernels.flash_attention.reference import flash_attention

__all__ = ["flash_attention"]
