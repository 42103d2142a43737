"""``python -m lmn_kernels.info``: print what `lmn_kernels.info` returns."""

from ._info import info

if __name__ == "__main__":
    print(info())
