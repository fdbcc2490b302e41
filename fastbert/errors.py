"""Exceptions whose message is one clear line for the user."""


class InputError(ValueError):
    """Something the user gave is wrong: what, which value, from which file and key, and what to do about it. Exit code 2."""


class Diverged(RuntimeError):
    """A model gives numbers that are not finite: NaN or infinity. Exit code 1."""
