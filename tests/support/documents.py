"""Tokenized documents of tests."""

import numpy as np

from gptoss_jax.data import Encoded


def document(ids, weights, labels=None) -> Encoded:
    ids = np.asarray(ids, np.int32)
    return Encoded(ids, ids if labels is None else np.asarray(labels, np.int32), np.asarray(weights, np.float32))
