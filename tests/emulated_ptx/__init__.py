"""An executor of PTX on numpy arrays: what Triton and nvcc compile runs here without a GPU, and is watched.

A lane of an array is a thread; the lanes of many CTAs go together, a basic block at a time.

- `parser` reads the text; `flow` finds out what holds on every way to an instruction; `translation` makes a Python
  function of each basic block, by the families of instructions (`arithmetic`, `conversions`, `transfers`,
  `warp`, `tensor`, `synchronisation`).
- `machine` runs the blocks: `arena` is global memory, `shared` that of the CTAs, `shadow` what was touched by whom;
  `matrices` are the tensor cores. What is wrong is a `findings.Finding`; what was done is counted by `counts`.
- `driver` makes all of it a device of Triton's.
"""
