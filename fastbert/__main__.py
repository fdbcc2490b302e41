"""`python -m fastbert` runs the command line, without the current folder on the search path.

Python's -m puts the current folder on the search path. Here it is removed before anything else is
imported, so that a user's own `random.py` or `json.py` is not imported by mistake.
"""

import os
import sys


def _forget_current_folder() -> None:
    """Remove the current folder from the search path.

    Modules that Python imports before this line cannot be protected here. From Python 3.11 on,
    `python -P -m fastbert` protects them too.
    """
    try:
        first = sys.path[0] == os.getcwd()
    except OSError:  # the current folder was deleted
        return
    if first and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_folder()
    from fastbert.cli import main

    main()
