"""Whatever a WebUI did before, in whatever order, the next image is the one that it would have made alone."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import ACTIONS, act, prepare, tensors


@pytest.fixture(scope="module")
def prepared(host, standin):
    if host is not standin:
        pytest.skip("soak.py does this to running hosts")
    with host.another_checkpoint():
        prepare(host)
        yield host


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 2**31)), min_size=2, max_size=6
    )
)
def test_no_order_of_actions_changes_a_later_image(prepared, actions):
    for name, seed in actions:
        act(prepared, name, seed)


@pytest.mark.parametrize("name", ACTIONS)
def test_no_action_leaves_tensors_behind(prepared, name):
    act(prepared, name, 1)
    before = tensors(prepared)
    for _ in range(2):
        act(prepared, name, 1)
    after = tensors(prepared)
    assert after["count"] <= before["count"]
    assert after["bytes"] <= before["bytes"]
