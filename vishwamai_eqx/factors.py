"""Whole numbers that fit: what refusals propose, and what a plan tries."""

import math


def divisors(value: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, math.isqrt(value) + 1) if value % n == 0]
    return sorted({*small, *(value // n for n in small)})


def closest(choices: list[int], value: int) -> int | None:
    """The choice that is nearest to a value."""
    return min(choices, key=lambda choice: abs(choice - value), default=None)
