"""A linear classifier on frozen features."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression


def linear_probe_predict(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    """Labels by multinomial logistic regression with a unit L2 penalty: int64 [tests].

    Features are to be standardized. All of `train_x` [n, width] is fitted at once by L-BFGS, in
    memory: meant for up to some hundred thousand samples.
    """
    return LogisticRegression(C=1.0, max_iter=2000).fit(train_x, train_y).predict(test_x)
