"""Imported once by the server that ranks are forked from: what they would otherwise import and make each, for seconds.

Not DeepSpeed, which reads its environment while it is imported; what it imports in turn takes most of its time.
"""

import gc
from contextlib import suppress
from importlib import import_module

for name in (
    "hypothesis",
    "mlflow",  # by DeepSpeed
    "pytest",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.model_selection",
    "sklearn.svm",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "fairscale",
    "largescale.cli",
    "largescale.evaluate.measure",
    "largescale.pretrain",
    "largescale.run.preflight",
):
    import_module(name)

harness = import_module("tests.methods.harness")
for method in harness.METHODS:
    with suppress(Exception):  # the tests of a recipe say what is wrong with it
        harness.mini(method)  # its schema is made once, then copied

gc.collect()
gc.freeze()  # else each rank's garbage collector goes over all that, and so copies its pages
