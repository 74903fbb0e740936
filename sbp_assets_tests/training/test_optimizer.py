from itertools import pairwise

import pytest

from sbp_assets.training.optimizer import learning_rate
from sbp_assets_tests.training.conftest import OPTIMIZER


def test_learning_rate_warms_up_peaks_and_ends_at_the_final_share():
    settings = OPTIMIZER.model_copy(update={"warmup": 0.1, "final_learning_rate": 0.2, "learning_rate": 1.0})
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] and rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert learning_rate(0, 1, settings) == 1.0
