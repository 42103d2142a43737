"""Launchers of the compiled parallel form on a CPU (csrc/parallel.cpp)."""
