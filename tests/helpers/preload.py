"""Imported once by the server that ranks are forked from: what they would otherwise import each, for seconds.

Not DeepSpeed, which reads its environment while it is imported; what it imports in turn takes most of its time.
"""

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401

