"""The build; whatever can be declared is in pyproject.toml.

There is no C++ source yet, so every machine gets the same pure-Python wheel. Once csrc/ has sources,
this file alone decides whether they are compiled: only where torch and a compiler are already there, and
with a pure wheel as the answer everywhere else. Building uses no network and never asks for torch.
"""

from setuptools import setup

setup()
