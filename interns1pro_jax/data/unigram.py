"""The best loss without context: what a model must be below to have learned more than how often tokens occur."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def unigram_loss(train_counts: Int[np.ndarray, " V"], held_out_counts: Int[np.ndarray, " V"]) -> float:
    """Cross entropy, in nats per label, of held-out labels under the frequencies of the training labels.

    Frequencies are smoothed by one count for each id, so that a label never seen in training costs a finite amount.
    Counts are `PackedData.label_counts`: exactly the labels that the model's loss averages over.

    Raises:
      ValueError: vocabularies of different sizes, or nothing held out.
    """
    if train_counts.shape != held_out_counts.shape:
        raise ValueError(f"counts of {train_counts.size} and {held_out_counts.size} ids do not belong to one vocabulary.")
    if not held_out_counts.any():
        raise ValueError("there are no held-out labels.")
    log_p = np.log(train_counts + 1.0) - np.log((train_counts + 1.0).sum())
    return float(-(held_out_counts * log_p).sum() / held_out_counts.sum())
