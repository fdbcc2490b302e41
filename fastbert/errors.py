"""The one exception for bad input: its message is one clear line, and the command line exits with 2."""


class InputError(ValueError):
    """Something the user gave is wrong: what, which value, from which file and key, and what to do about it."""
