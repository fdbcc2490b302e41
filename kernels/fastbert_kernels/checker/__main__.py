"""`python -m fastbert_kernels.checker`."""

import sys

from fastbert_kernels.checker.command import main

if __name__ == "__main__":
    sys.exit(main())
