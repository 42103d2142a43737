"""The pure-PyTorch side: the definition that everything is checked against, and the CPU/MPS path.

Plain torch, any device and float dtype; nothing here imports ``lmn_kernels``.
"""
