"""Images as HTML: what a feature space calls near, what the outputs of a head stand for, and what goes wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from largescale.data.decode import decode
from largescale.data.reader import SampleError, ShardReader
from largescale.evaluate.knn import nearest
from largescale.report.evaluated import Part, Predictions
from largescale.report.html_parts import escape
from shards.ground.errors import InputError

_THUMBNAIL = 84

QUERIES, NEIGHBOURS, OUTPUTS, NEAREST_IMAGES, FAILURES = 8, 9, 10, 10, 24


def neighbours(train: Part, test: Part, seed: int) -> str:
    """Rows of a random query and its nearest training images, framed by whether the class is the same."""
    chosen = torch.from_numpy(_queries(test.features.labels.numpy(), seed))
    bank = train.features
    _, rows = nearest(bank.features, test.features.features[chosen], min(NEIGHBOURS, len(bank)))
    lines = []
    for query, found in zip(chosen.tolist(), rows.tolist(), strict=True):
        label = test.class_of(query)
        cells = [_figure(test.reader, int(test.features.ids[query]), label, "query", "query")]
        for row in found:
            other = train.class_of(row)  # names: the numbers may be of another list
            kind = "same" if other == label else "other"
            cells.append(_figure(train.reader, int(bank.ids[row]), other, kind, f"{kind} class"))
        lines.append(_strip("".join(cells), f"a query of class {label} and its nearest training images"))
    return "".join(lines)


def _queries(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows of random samples [QUERIES], from as many different classes as possible."""
    order = np.random.default_rng(seed).permutation(len(labels))
    _, first_of_class = np.unique(labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first_of_class)
    return order[np.concatenate([np.sort(first_of_class), others])[:QUERIES]]


def exemplars(scores: torch.Tensor, ids: torch.Tensor, bank: ShardReader, seed: int) -> str:
    """Rows of the images with the largest scores of some outputs, from scores [M, K] of samples `ids` [M]; each with
    the share of the samples that it is nearest to.
    """
    used = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    alive = torch.nonzero(used).flatten().numpy()
    chosen = np.sort(np.random.default_rng(seed).permutation(alive)[:OUTPUTS])
    lines = []
    for output in chosen.tolist():
        best = scores[:, output].topk(min(NEAREST_IMAGES, len(ids)))
        cells = [
            _figure(bank, int(ids[row]), f"{value:.2f}", "plain", "score")
            for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        name = f'<div class="name">#{output}<br>{float(used[output]) / len(ids):.2%}</div>'
        lines.append(_strip(name + "".join(cells), f"images of output {output}"))
    return "".join(lines)


def rows_of_pictures(columns: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """A row for each image, of its picture in each column, uint8 [N, 3, h, w]."""
    lines = []
    for row in zip(*columns, strict=True):
        cells = [_picture(to_pil_image(one), name, "drawn", name) for one, name in zip(row, names, strict=True)]
        lines.append(_strip("".join(cells), "an image and what the task makes of it"))
    return f'<div class="rows">{"".join(lines)}</div>'


def failures(test: Part, found: Predictions) -> tuple[int, str]:
    """The test images that kNN is most sure of and wrong about; and how many it is wrong about."""
    truth = test.features.labels.numpy()[found.rows]
    wrong = np.flatnonzero(truth != found.classes)
    worst = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:FAILURES]
    cells = [
        _figure(
            test.reader,
            int(test.features.ids[found.rows[place]]),
            f"{test.features.classes[truth[place]]}, taken for {test.features.classes[found.classes[place]]} "
            f"({found.confidence[place]:.0%})",
            "failure",
            "",
        )
        for place in worst.tolist()
    ]
    return len(wrong), f'<div class="wall">{"".join(cells)}</div>'


def _strip(cells: str, says: str) -> str:
    return f'<div class="strip" tabindex="0" role="group" aria-label="{escape(says)}">{cells}</div>'


def _figure(reader: ShardReader, sample_id: int, caption: str, kind: str, what: str) -> str:
    return _picture(picture(reader, sample_id), caption, kind, f"{what} {caption}".strip())


def _picture(image: Image.Image, caption: str, kind: str, alt: str) -> str:
    source = data_url(image)
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{escape(alt)}" loading="lazy">'
        f'<figcaption title="{escape(caption)}">{escape(caption)}</figcaption></figure>'
    )


def picture(reader: ShardReader, sample_id: int) -> Image.Image:
    """A sample's image, grey where it is no longer what was evaluated."""
    try:
        return to_pil_image(decode(reader.read(sample_id), max_pixels=1 << 28))
    except (SampleError, InputError):  # an image, or a whole shard
        return no_picture()


def no_picture() -> Image.Image:
    """What stands for an image that is not there: grey."""
    return Image.new("RGB", (28, 28), "#cccccc")


def data_url(image: Image.Image) -> str:
    """A thumbnail of an image; small ones stay as they are and are enlarged by the page."""
    image.thumbnail((_THUMBNAIL * 2, _THUMBNAIL * 2))
    buffer = io.BytesIO()
    small = max(image.size) <= 64
    image.save(buffer, "PNG" if small else "JPEG")
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
