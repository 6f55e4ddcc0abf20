from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from largescale.evaluate.ways import of_classes
from tests.helpers.features import features


def test_counts_are_of_images_that_were_measured_and_learnt_from():
    corpora = [
        SimpleNamespace(manifest=SimpleNamespace(num_samples=num, name=name)) for num, name in [(60, "a"), (9, "b")]
    ]
    subject: Any = SimpleNamespace(shards=tuple(corpora))
    results: dict[str, Any] = {"pretrained": {"top1": 0.25, "hits": [True, False] * 4}}  # one cannot be read
    found = of_classes(results, subject, features(60, 0), features(9, 1))
    assert (found.num_train, found.num_test) == (60, 8)
    assert found.doubts == ["1 of 9 samples of b are left out: unlabelled or unreadable"]
    results = {"pretrained": {"top1": 0.25, "num_train": 6}}
    assert of_classes(results, subject, features(60, 0), features(9, 1)).num_train == 6
    alone = of_classes({"pretrained": {}}, subject, None, features(9, 1))
    assert (alone.num_train, alone.num_test, alone.doubts) == (0, 9, [])
