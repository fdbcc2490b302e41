"""`python -m fastbert` is `fastbert`: from here on nothing is imported from the current folder, which Python's -m has put on its search path."""

import os
import sys


def _forget_current_folder() -> None:
    """What Python itself imports before this line is beyond our reach; `python -P -m fastbert` keeps that safe too, from Python 3.11 on."""
    try:
        first = sys.path[0] == os.getcwd()
    except OSError:  # the folder is gone
        return
    if first and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_folder()
    from fastbert.cli import main

    main()
