from sbp_assets.training.plan import evaluation_steps


def test_evaluations_are_spread_to_the_last_step():
    assert evaluation_steps(100, 4) == {0, 25, 50, 75, 100}
    assert evaluation_steps(3, 20) == {0, 1, 2, 3}
