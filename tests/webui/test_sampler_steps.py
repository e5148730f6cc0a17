"""The step of every evaluation, as samplers count them."""

import pytest

from klora.webui.sampler_steps import step_of

COUNTS = [
    ("Euler", 1, 4, [0, 1, 2, 3]),
    ("Heun", 2, 4, [0, 0, 1, 1, 2, 2, 3]),
    ("HeunPP2", 1, 4, [0, 0, 0, 1, 1, 1, 2, 2, 3]),
    ("HeunPP2", 1, 1, [0]),
    ("Kohaku LoNyu Yog", 1, 4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
    ("DPM++ 2s a RF", 1, 3, [0, 0, 1, 1, 2]),
]


@pytest.mark.parametrize(("sampler", "order", "steps", "clock"), COUNTS)
def test_evaluations_of_a_pass(sampler, order, steps, clock):
    assert [step_of(i, sampler, steps=steps, order=order) for i in range(len(clock))] == clock
    assert step_of(len(clock) + 9, sampler, steps=steps, order=order) >= steps - 1
