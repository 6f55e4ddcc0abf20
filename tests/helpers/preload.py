"""Imported once by the server that ranks are forked from: what they would otherwise import each, for seconds.

Not DeepSpeed, which reads its environment while it is imported; what it imports in turn takes most of its time.
"""

from importlib import import_module

for name in (
    "hypothesis",
    "pytest",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "fairscale",
    "largescale.cli",
    "largescale.evaluate.measure",
    "largescale.pretrain",
    "largescale.run.preflight",
):
    import_module(name)
