"""What a session records is what ran, and a map of it is blank where nothing ran."""

import numpy as np

from klora.core.methods import FULL
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import LayerScore, PairScores
from klora.selection_map import NOT_RUN, draw_map
from klora.session import Session


class Layers:
    """A switch that remembers what is on each layer."""

    def __init__(self):
        self.on = {}

    def attach(self):
        pass

    def apply(self, strengths):
        self.on.update(strengths)

    def detach(self):
        self.on = {}


def plan_of(steps):
    layers = [
        LayerScore(f"input_blocks.{i}.1.proj_in", 4, 2, 2, 1.0 + i / 10, 1.2, 1.0, 1.0, 1.0, 1.0, None)
        for i in range(8)
    ]
    return make_plan(PairScores(tuple(layers), 1.0), steps=steps, schedule=Schedule.named("s"))


def test_only_steps_that_ran_are_recorded_and_preparing_is_no_step():
    plan, layers = plan_of(6), Layers()
    with Session(plan, layers) as session:
        session.prepare(2)
        assert list(layers.on.values()) == [tuple(levels) for levels in (plan.strengths[2] / FULL).tolist()]
        assert (session.recorded() == -1).all()
        for step in (2, 2, 3):
            session.step(step)
    ran = np.isin(np.arange(6), (2, 3))
    assert (session.recorded()[ran] == plan.strengths[ran]).all()
    assert (session.recorded()[~ran] == -1).all()


def blank_pixels(image):
    return int((np.asarray(image) == NOT_RUN).all(-1).sum())


def test_the_map_of_what_ran_is_blank_elsewhere():
    plan = plan_of(6)
    rows = plan.strengths.astype(np.int8)
    rows[3:] = -1
    whole, half = (blank_pixels(draw_map(plan, "dog", "ink", strengths)) for strengths in (None, rows))
    height, width = 24, 16
    assert half - whole >= 3 * height * len(plan.layer_names) * width
