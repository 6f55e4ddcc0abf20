"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Input that cannot be used as it is; its message is one line: what, where, how to mend."""
