"""``python -m lmn_kernels.info``: as ``python -m lmn_kernels``."""

import sys

from .backend.info import info

if __name__ == "__main__":
    print(info())
else:
    # Importing a submodule binds its name in the package, where `info` is, and stays, the function.
    sys.modules[__name__] = info  # type: ignore[assignment]
