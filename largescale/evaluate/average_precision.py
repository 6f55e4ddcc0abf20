"""COCO's average precision of detections: torchmetrics' with pycocotools, over the images of all ranks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from largescale.evaluate.annotations import Scene
from largescale.evaluate.shares import from_all_ranks
from largescale.processes import from_rank_0, rank
from shards.ground.errors import InputError

_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_100": "recall_100",
}
"""torchmetrics' names, and those of results."""


def need_packages() -> ModuleType:
    """torchmetrics' detection.

    Raises:
        InputError: it, or pycocotools, is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
        from torchmetrics import detection
    except ImportError as error:
        raise InputError(
            f"largescale evaluate detection: {error.name} is not installed; run pip install 'largescale[detection]'"
        ) from error
    return detection


class AveragePrecision:
    """Collects what was found in this rank's images.

    Args:
        masks: whether masks are measured, beside boxes.
    """

    def __init__(self, *, masks: bool) -> None:
        kinds = ("bbox", "segm") if masks else ("bbox",)
        # Its own exchange between ranks takes for granted that each has as many images.
        self._metric = need_packages().MeanAveragePrecision(
            iou_type=kinds, class_metrics=True, backend="pycocotools", sync_on_compute=False
        )
        self._kinds, self._found = kinds, dict[str, dict[str, Any]]()

    def add(self, number: int, found: dict[str, Tensor], truth: Scene) -> None:
        """One image.

        Args:
            number: of the sample.
            found: as torchvision's detectors give it, on the host: `boxes` [N, 4] (left, top, right, bottom in px),
                `scores` [N], `labels` [N] (numbers of categories as annotated) and, if measured, `masks` [N, 1, H, W]
                from 0 to 1.
            truth: what there is.
        """
        found = {key: found[key] for key in ("boxes", "scores", "labels")} | (
            {"masks": found["masks"][:, 0] >= 0.5} if "segm" in self._kinds else {}
        )
        target = {
            "boxes": truth.boxes,
            "labels": truth.categories,
            "iscrowd": truth.crowds.long(),
            "area": truth.areas,
            **({"masks": truth.masks.bool()} if truth.masks is not None and "segm" in self._kinds else {}),
        }
        self._metric.reset()
        self._metric.update([found], [target])
        self._found[str(number)] = {name: value[0] for name, value in self._metric.metric_state.items() if value}

    def figures(self) -> dict[str, Any]:
        """By name, shares: `box_ap` and others, `mask_ap` and others, and `..._ap_by_category`; what no object says
        anything of is left out. `num_images` and `num_objects` (without crowds) are those that took part.

        Collectives: every rank must call it; an all-gather and a broadcast of objects.
        """
        found = from_all_ranks(self._found)
        return from_rank_0(self._of(found) if rank() == 0 else {})

    def _of(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        self._metric.reset()
        for number in sorted(found, key=int):  # the order decides between equal scores
            for name, value in found[number].items():
                self._metric.metric_state[name].append(value)
        crowds = self._metric.groundtruth_crowds
        counts = {"num_images": len(found), "num_objects": sum(int((crowd == 0).sum()) for crowd in crowds)}
        if not counts["num_objects"]:
            return counts
        self._metric.update([], [])  # else it warns that nothing was added
        values = self._metric.compute()
        figures: dict[str, Any] = {}
        for kind in self._kinds:
            theirs, ours = f"{kind}_" if len(self._kinds) > 1 else "", "box" if kind == "bbox" else "mask"
            for name, short in _NAMES.items():
                if (value := float(values[theirs + name])) >= 0:
                    figures[f"{ours}_{short}"] = value
            classes, shares = torch.atleast_1d(values["classes"]), torch.atleast_1d(values[f"{theirs}map_per_class"])
            figures[f"{ours}_ap_by_category"] = {
                str(number): share
                for number, share in zip(classes.tolist(), shares.tolist(), strict=True)
                if share >= 0
            }
        return figures | counts
