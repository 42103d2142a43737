"""Triton kernels and their launchers. Imported at the first call that needs one, never with the package."""
