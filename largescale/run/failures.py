"""How a run ends before its last step."""


class TrainingStopped(Exception):
    """The run cannot go on; its last checkpoint is whole and its message says what happened."""
