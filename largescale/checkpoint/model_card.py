"""The page that travels with exported weights: what they are, how to load them, what they were measured to be worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from largescale.checkpoint.exported import Network


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        protocol: how it was measured, such as `knn`.
        images: name of those that it was measured on.
        measure: what was measured, such as `top1`.
        value, untrained: of the network, and of the same one untrained (None where that was not measured).
        is_share: whether they are shares, to be shown in percent.
    """

    protocol: str
    images: str
    measure: str
    value: float
    untrained: float | None
    is_share: bool = False

    def in_words(self, value: float | None) -> str:
        """One of its values; empty for None."""
        if value is None:
            return ""
        return f"{100 * value:.2f}%" if self.is_share else f"{value:.4g}"


def model_card(network: Network, load: str, figures: Sequence[Figure], *, in_timm: bool) -> str:
    """The page in Markdown, with the front matter of Hugging Face; the licence is left to be filled in.

    Args:
        network: what was exported.
        load: Python that loads it.
        figures: what is known of it.
        in_timm: whether timm can load it.
    """
    about, values = network.about(), network.values
    rows = [
        f"| {one.protocol} | {one.images} | {one.measure} | {one.in_words(one.value)} | {one.in_words(one.untrained)} |"
        for one in figures
    ]
    measured = (
        "Not measured yet: `largescale evaluate knn RUN` (`spectrum` without labels) measures it; export again to list "
        "the result."
    )
    if rows:
        measured = "\n".join(["| protocol | images | measure | value | untrained |", "|---|---|---|---|---|", *rows])
    settings = "\n".join(f"{key}: {json.dumps(value)}" for key, value in sorted(values.items()) if key != "run.dir")
    labels = network.config.method.uses_labels()
    kind = "pretraining that uses labels" if labels else "self-supervised pretraining without labels"
    tags = [*([] if labels else ["self-supervised"]), "image-feature-extraction", *(["timm"] if in_timm else [])]
    library = "library_name: timm\n" if in_timm else ""
    return f"""---
{library}pipeline_tag: image-feature-extraction
tags: [{", ".join(tags)}]
license: unknown  # fill in the licence of these weights
---

# {values.get("name", network.run_dir.name)}: {about["architecture"]}

Features of images, {about["num_features"]} numbers each, from {kind}
(`{values.get("method.name")}`, {about["step"]} steps of {values.get("train.global_batch")} images).

## Loading

```python
{load.strip()}
```

Images are RGB from 0 to 1, shorter side resized to {about["resize"]} pixels ({about["interpolation"]}), cropped to
{" x ".join(map(str, json.loads(about["input_size"])[1:]))}, normalised with mean {about["mean"]} and standard deviation
{about["std"]}.

## What it is worth

{measured}

## Where it comes from

| what | identity |
|---|---|
| weights | `{about["weights"]}` |
| training images (manifests of the shards) | `{about["data"] or "unknown"}` |
| configuration | `sha256:{about["config_sha256"]}` |

Licence of the weights: to be filled in above. Describe here what the training images show, and what they may be used
for.

<details><summary>Configuration</summary>

```yaml
{settings}
```

</details>
"""
