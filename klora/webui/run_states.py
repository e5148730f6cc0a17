"""The states of a run, and the one table of transitions between them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """What a run is doing.

    It is `WITHOUT` the pair once the host has loaded a checkpoint that the LoRAs do not fit, or any other
    checkpoint in the middle of a pass, until a pass begins on one that they fit. `FAILED` follows an error
    that ends the generation, `GIVEN_UP` one after which the host makes the rest of it without K-LoRA.
    """

    PREPARED = "prepared"
    ENCODING = "encoding"
    SAMPLING = "sampling"
    WITHOUT = "without the pair"
    SAMPLING_WITHOUT = "sampling without the pair"
    FAILED = "failed"
    GIVEN_UP = "given up"
    CLOSED = "closed"


class Event(Enum):
    """What happens to a run."""

    ENCODE = "encode"
    ENCODED = "have encoded"
    SAMPLE = "sample"
    SAMPLED = "have sampled"
    LOSE = "lose the pair"
    FIT = "have a checkpoint that fits"
    FAIL = "fail"
    GIVE_UP = "give up"
    CLOSE = "be closed"


_ENDS = {Event.GIVE_UP: State.GIVEN_UP, Event.FAIL: State.FAILED, Event.CLOSE: State.CLOSED}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.PREPARED: {
        Event.ENCODE: State.ENCODING, Event.SAMPLE: State.SAMPLING, Event.LOSE: State.WITHOUT,
        Event.FIT: State.PREPARED, **_ENDS,
    },
    State.ENCODING: {
        Event.ENCODED: State.PREPARED, Event.LOSE: State.WITHOUT, Event.FIT: State.ENCODING, **_ENDS,
    },
    State.SAMPLING: {
        Event.SAMPLED: State.PREPARED, Event.LOSE: State.SAMPLING_WITHOUT, Event.FIT: State.SAMPLING,
        Event.FAIL: State.FAILED, Event.CLOSE: State.CLOSED,
    },
    State.WITHOUT: {
        Event.SAMPLE: State.SAMPLING_WITHOUT, Event.LOSE: State.WITHOUT, Event.FIT: State.PREPARED, **_ENDS,
    },
    State.SAMPLING_WITHOUT: {
        Event.SAMPLED: State.WITHOUT, Event.LOSE: State.SAMPLING_WITHOUT, Event.FIT: State.SAMPLING,
        Event.FAIL: State.FAILED, Event.CLOSE: State.CLOSED,
    },
    State.FAILED: {Event.CLOSE: State.CLOSED},
    State.GIVEN_UP: {Event.CLOSE: State.CLOSED},
    State.CLOSED: {},
}  # fmt: skip
"""An event that a state does not list has no effect, because the host's hooks may come late, or twice."""

WITHOUT = (State.WITHOUT, State.SAMPLING_WITHOUT)
SAMPLING = (State.SAMPLING, State.SAMPLING_WITHOUT)
OVER = (State.FAILED, State.GIVEN_UP, State.CLOSED)
