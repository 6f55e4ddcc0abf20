"""Self-supervised methods: `method` is their contract, `table` names them, each has a file or a folder."""

from largescale.methods.method import Method, Output
from largescale.methods.table import METHODS, build_method, method_class, require_fit

__all__ = ["METHODS", "Method", "Output", "build_method", "method_class", "require_fit"]
