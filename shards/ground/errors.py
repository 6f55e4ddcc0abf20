"""The one exception for what a user can fix, and errors in a line."""


class InputError(ValueError):
    """Input that cannot be used as it is; its message is one line: what, where, how to fix."""


def line_of(error: BaseException) -> str:
    """An error in a line: of one of the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
