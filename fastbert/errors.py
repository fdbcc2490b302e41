"""Exceptions whose message is one clear line for the user."""


class InputError(ValueError):
    """The user's input is wrong. Exit code 2.

    The message names what is wrong, the value, the file and key, and what to do about it.
    """


class Diverged(RuntimeError):
    """A model produces values that are not finite, NaN or infinity. Exit code 1."""
