"""Logarithmic Memory Networks: attention over O(log n) learned summaries instead of n tokens.

Start with `LogarithmicMemory`, a drop-in for the original's block, or `LogarithmicMixing`, which takes
the place of self-attention in a block of yours. `LookAheadMemory` is LaMemo, the second memory system.
``python -m lmn_kernels.info`` tells what runs where.
"""

from python_ref.sequences import Sequences
from python_ref.step import StepWeights
from python_ref.tree import LinearMerge

from ._version import __version__
from .backend.choice import BackendError, why_not
from .backend.info import info
from .layers.block import ExpanderSummarizerLogarithmicMemory, FeedForward, LogarithmicMemory
from .layers.look_ahead import LookAheadMemoryAttention, LookAheadMemoryLayer, Reach
from .layers.look_ahead_model import LookAheadLanguageModel, LookAheadMemory
from .layers.mixing import LogarithmicMixing
from .layers.summarizers import LinearMapSummarizer
from .ops.attention import attend
from .ops.look_ahead import look_ahead_attend
from .ops.step import decode_, update_
from .ops.tree import build_tree
from .states.files import load_states, save_states
from .states.look_ahead import LookAheadState
from .states.memory import MemoryState

__all__ = [
    "BackendError",
    "ExpanderSummarizerLogarithmicMemory",
    "FeedForward",
    "LinearMapSummarizer",
    "LinearMerge",
    "LogarithmicMemory",
    "LogarithmicMixing",
    "LookAheadLanguageModel",
    "LookAheadMemory",
    "LookAheadMemoryAttention",
    "LookAheadMemoryLayer",
    "LookAheadState",
    "MemoryState",
    "Reach",
    "Sequences",
    "StepWeights",
    "__version__",
    "attend",
    "build_tree",
    "decode_",
    "info",
    "load_states",
    "look_ahead_attend",
    "save_states",
    "update_",
    "why_not",
]
