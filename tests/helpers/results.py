"""Results of evaluations, without an evaluation."""

from __future__ import annotations

from largescale.evaluate.made_from import VERSION


def record(
    top1: float = 0.5, *, protocol: str = "knn", test: str = "test", measured: str = "2026-01-01", size: int = 28
) -> dict:
    """A result of three test images at step 4, as `evaluate` writes it but for the checksum."""
    shards = {"location": f"/data/{test}", "name": test, "fingerprint": test}
    made_from = {
        "version": VERSION,
        "weights": {"step": 4, "hash": "a"},
        "test_shards": shards,
        "train_shards": shards,
        "images": {"size": size},
    }
    return {
        "protocol": protocol,
        "settings": {"knn_temperature": 0.07},
        "num_train": 9,
        "num_test": 3,
        "measured": measured,
        "checkpoint_step": 4,
        "warnings": [],
        "results": {"pretrained": {"top1": top1, "top1_by_k": {"5": top1}}},
        "made_from": made_from,
    }
