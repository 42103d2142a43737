"""Logarithmic Memory Networks: attention over O(log n) learned summaries instead of n tokens.

Start with `LogarithmicMemory`, a drop-in for the original's block, or `LogarithmicMixing`, which takes
the place of self-attention in a block of yours. `LookAheadMemory` is LaMemo, the second memory system.
``python -m lmn_kernels.info`` tells what runs where.
"""

from python_ref.tree import LinearMerge

from ._backend import BackendError
from ._info import info
from ._version import __version__
from .block import ExpanderSummarizerLogarithmicMemory, FeedForward, LogarithmicMemory
from .decoding import StepWeights, decode_, update_
from .functional import attend, build_tree, look_ahead_attend
from .look_ahead import LookAheadMemoryAttention, LookAheadMemoryLayer, Reach
from .look_ahead_model import LookAheadLanguageModel, LookAheadMemory
from .look_ahead_state import LookAheadState
from .mixing import LogarithmicMixing
from .sequences import Sequences
from .state import MemoryState, load_states, save_states
from .summarizers import LinearMapSummarizer

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
]
