"""Images of a report as HTML: what a feature space calls near, and what the outputs of a head stand for."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from largescale.data.decode import decode
from largescale.data.reader import SampleError, ShardReader
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.knn import nearest
from shards.ground.errors import InputError

_THUMBNAIL = 84

QUERIES, NEIGHBOURS, OUTPUTS, NEAREST_IMAGES = 8, 9, 10, 10


def neighbours(train: FeatureSet, test: FeatureSet, bank: ShardReader, queries: ShardReader, seed: int) -> str:
    """Rows of a random query and its nearest training images, framed by whether the class is the same."""
    chosen = torch.from_numpy(_queries(test.labels.numpy(), seed))
    _, rows = nearest(train.features, test.features[chosen], min(NEIGHBOURS, len(train)))
    lines = []
    for query, found in zip(chosen.tolist(), rows.tolist(), strict=True):
        label = test.classes[int(test.labels[query])]
        cells = [_figure(queries, int(test.ids[query]), label, "query")]
        for row in found:
            other = train.classes[int(train.labels[row])]  # names: the numbers may be of another list
            cells.append(_figure(bank, int(train.ids[row]), other, "same" if other == label else "other"))
        lines.append(f'<div class="strip">{"".join(cells)}</div>')
    return "".join(lines)


def _queries(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows of random samples [QUERIES], from as many different classes as possible."""
    order = np.random.default_rng(seed).permutation(len(labels))
    _, first_of_class = np.unique(labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first_of_class)
    return order[np.concatenate([np.sort(first_of_class), others])[:QUERIES]]


def exemplars(scores: torch.Tensor, ids: torch.Tensor, bank: ShardReader, seed: int) -> str:
    """Rows of the images with the largest scores of some outputs, from scores [M, K] of samples `ids` [M]."""
    used = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    alive = torch.nonzero(used).flatten().numpy()
    chosen = np.sort(np.random.default_rng(seed).permutation(alive)[:OUTPUTS])
    lines = []
    for output in chosen.tolist():
        best = scores[:, output].topk(min(NEAREST_IMAGES, len(ids)))
        cells = [
            _figure(bank, int(ids[row]), f"{value:.2f}", "plain")
            for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        lines.append(f'<div class="strip"><div class="name">#{output}</div>{"".join(cells)}</div>')
    return "".join(lines)


def _figure(reader: ShardReader, sample_id: int, caption: str, kind: str) -> str:
    return (
        f'<figure class="{kind}"><img src="{_thumbnail(reader, sample_id)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _thumbnail(reader: ShardReader, sample_id: int) -> str:
    """An image as a data URI; small ones stay as they are and are enlarged by the page."""
    try:
        image = to_pil_image(decode(reader.read(sample_id), max_pixels=1 << 28))
    except (SampleError, InputError):  # an image, or a whole shard, that is no longer what was evaluated
        image = Image.new("RGB", (28, 28), "#cccccc")
    image.thumbnail((_THUMBNAIL * 2, _THUMBNAIL * 2))
    buffer = io.BytesIO()
    small = max(image.size) <= 64
    image.save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
