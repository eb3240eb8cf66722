"""``python -m r_tsvm_kernels`` is the command ``rtsvm``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
