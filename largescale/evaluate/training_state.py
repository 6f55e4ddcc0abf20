"""What a killed evaluation goes on from: the state of a training, and results of networks that are done.

    eval/unfinished/
      finetune-1a2b3c4d-pretrained.safetensors    trained tensors and the optimizer's, some dozen times per training
      finetune-1a2b3c4d-pretrained.json           the result of a network that is done, while a baseline still trains

Names hold the identity of all that decides the result. Files are written whole, by rank 0, and removed with the result.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from largescale.evaluate.shares import from_all_ranks
from largescale.processes import from_rank_0, on_rank_0, rank
from shards.ground.files import atomic_write, names_in

_PARTS = 40
"""A training is saved about so many times."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unfinished:
    """The files of one measurement of one network.

    Attributes:
        folder: of all unfinished ones of a run.
        name: of this one.
    """

    folder: Path
    name: str

    @property
    def state_path(self) -> Path:
        """Where the state of the training is."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def result_path(self) -> Path:
        """Where the result is."""
        return self.folder / f"{self.name}.json"

    def result(self) -> dict[str, Any] | None:
        """The result, if this network is done. Collectives: one broadcast of an object."""
        return from_rank_0(_json_at(self.result_path) if rank() == 0 else None)

    def finish(self, result: dict[str, Any]) -> None:
        """Keep a result; the state is no longer needed. Collectives: one broadcast of an object."""

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.result_path) as file:
                file.write(json.dumps(result).encode())
            self.state_path.unlink(missing_ok=True)

        on_rank_0(write)

    def remove(self) -> None:
        """Remove all of it. Collectives: one broadcast of an object."""

        def unlink() -> None:
            for path in (self.state_path, self.result_path):
                path.unlink(missing_ok=True)
            if self.folder.is_dir() and not names_in(self.folder):
                self.folder.rmdir()

        on_rank_0(unlink)


class TrainingState:
    """Reads and writes the state of a training: everything else follows from the step.

    Args:
        place: its files.
        tensors: all that is trained, by name; they are filled and saved in place.
        optimizer: whose state is nothing but tensors.
        batch, steps: images per step and steps; another number of ranks may have others.
        noted: what this rank has found out while it trained, by name; filled and saved in place, of all ranks.
    """

    def __init__(
        self,
        place: Unfinished,
        tensors: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        batch: int,
        steps: int,
        noted: dict[str, str] | None = None,
    ) -> None:
        self._place, self._tensors, self._optimizer = place, tensors, optimizer
        self._noted = {} if noted is None else noted
        self._about = {"batch": str(batch), "steps": str(steps)}
        self._every = max(1, steps // _PARTS)

    def load(self) -> int:
        """Fill tensors and the optimizer's state; the step to go on with, 0 if there is nothing that fits.

        Collectives: every rank must call it; one broadcast of an object. All ranks read the file.
        """
        step, noted = from_rank_0(self._there() if rank() == 0 else (0, {}))
        self._noted.update(noted)
        if step == 0:
            return 0
        with safe_open(self._place.state_path, framework="pt") as file, torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(file.get_tensor(f"tensor.{name}"))
            for name in file.keys():  # noqa: SIM118
                kind, number, key = (*name.split(".", 2), "", "")[:3]
                if kind == "optimizer":
                    parameter = self._parameters()[int(number)]
                    tensor = file.get_tensor(name)
                    self._optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
        if rank() == 0:
            _log.info("going on at step %d of %s, from %s", step, self._about["steps"], self._place.state_path)
        return step

    def save(self, step: int) -> None:
        """Write what there is after `step` steps, where it is time to. Rank 0 alone writes.

        Collectives: every rank must call it; those of `from_all_ranks` where it is time to.
        """
        if step % self._every or step == int(self._about["steps"]):
            return
        noted = from_all_ranks(dict(self._noted))  # a copy: threads that read ahead add to it
        if rank() > 0:
            return
        tensors = {f"tensor.{name}": tensor for name, tensor in self._tensors.items()}
        for number, parameter in enumerate(self._parameters()):
            tensors |= {f"optimizer.{number}.{key}": one for key, one in self._optimizer.state[parameter].items()}
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._place.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._place.state_path) as file:
            about = json.dumps({**self._about, "step": step})
            file.write(safetensors.torch.save(host, metadata={"about": about, "noted": json.dumps(noted)}))

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _there(self) -> tuple[int, dict[str, str]]:
        """The step of a file that fits, 0 if there is none, and what was noted until then."""
        path = self._place.state_path
        try:
            with safe_open(path, framework="pt") as file:
                about, noted = json.loads(file.metadata()["about"]), json.loads(file.metadata().get("noted", "{}"))
                names = set(file.keys())
                step = int(about.pop("step"))
        except FileNotFoundError:
            return 0, {}
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
            _log.warning("%s: damaged; the training begins again", path)
            return 0, {}
        wanted = {f"tensor.{name}" for name in self._tensors}
        numbers = {name.split(".")[1] for name in names if name.startswith("optimizer.")}
        fits = numbers == {str(number) for number in range(len(self._parameters()))}
        if about != self._about or not fits or {name for name in names if name.startswith("tensor.")} != wanted:
            _log.warning("%s: of another batch (another number of ranks?); the training begins again", path)
            return 0, {}
        return step, noted


def _json_at(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
