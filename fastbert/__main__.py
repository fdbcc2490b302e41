"""`python -m fastbert` is `fastbert`."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
