"""Types of command-line arguments, whose errors name the option, what was expected and what came."""

from __future__ import annotations

import argparse
from collections.abc import Callable

# What torch.manual_seed takes.
LEAST_SEED, GREATEST_SEED = -(1 << 63), (1 << 64) - 1


def one_of(*names: str) -> Callable[[str], str]:
    """One of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def seed(text: str, least: int = LEAST_SEED) -> int:
    """A seed of torch's; those that also seed NumPy are at least 0."""
    try:
        number = int(text)
    except ValueError:
        number = GREATEST_SEED + 1
    if not least <= number <= GREATEST_SEED:
        low = "-2^63" if least == LEAST_SEED else least
        raise argparse.ArgumentTypeError(f"expected an integer in {low} … 2^64 - 1, got {text!r}")
    return number


def seed_of_numpy(text: str) -> int:
    """A seed of torch's and NumPy's."""
    return seed(text, 0)


# Backends of a model's layers; its steps choose for themselves.
backend = one_of("auto", "reference", "triton", "cpp")
