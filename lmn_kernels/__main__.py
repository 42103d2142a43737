"""``python -m lmn_kernels``: print what `lmn_kernels.info` returns."""

from .backend.info import info

if __name__ == "__main__":
    print(info())
