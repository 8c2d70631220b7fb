"""Published accuracies of encrypted language models, to be drawn beside one's own.

Source: Zama, Concrete ML, `use_case_examples/llm/QGPT2Evaluate.ipynb` (output of the cell under
"Performance Evaluation"), which belongs to the article "Towards Encrypted Large Language Models
with FHE": how often the most likely next token of the float GPT-2 is among the k most likely ones
of a GPT-2 with quantized attention in its first layer, on 78 English sentences, by n_bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PUBLISHED", "Series"]


@dataclass(frozen=True)
class Series:
    """Accuracies by number of bits."""

    label: str
    is_part: bool
    """Whether some heads are encrypted, not the whole attention."""
    top1: Mapping[int, float]
    top5: Mapping[int, float]


PUBLISHED = (
    Series(
        "published: GPT-2, one head of layer 0",
        True,
        {2: 0.7217, 3: 0.7217, 4: 0.9586, 5: 0.9561, 6: 0.9783, 7: 0.9854, 8: 0.9949, 9: 0.9981,
         10: 0.9968, 11: 0.9975},
        {2: 0.9153, 3: 0.9153, 4: 0.9987, 5: 0.9994, 6: 1.0, 7: 1.0, 8: 1.0, 9: 1.0, 10: 1.0,
         11: 1.0},
    ),
    Series(
        "published: GPT-2, attention of layer 0",
        False,
        {2: 0.5051, 3: 0.3299, 4: 0.3446, 5: 0.6299, 6: 0.5554, 7: 0.8083, 8: 0.9293, 9: 0.9611,
         10: 0.9809, 11: 0.9898},
        {2: 0.8102, 3: 0.6662, 4: 0.6025, 5: 0.8446, 6: 0.7732, 7: 0.9815, 8: 0.9994, 9: 1.0,
         10: 1.0, 11: 1.0},
    ),
)  # fmt: skip
"""What has been published, as far as we know."""
