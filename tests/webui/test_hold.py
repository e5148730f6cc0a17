"""What K-LoRA puts in the place of methods of the host's processing object is gone when it lets go, whoever else overrides them."""

from copy import copy

import pytest

from klora.webui.hold import let_go, override


class Processing:
    def sample(self):
        return "the host's"


@pytest.fixture
def p():
    return Processing()


def neighbour(p):
    """Another extension's method around the one that is there."""
    own = p.sample
    p.sample = lambda: f"neighbour of {own()}"


def test_the_object_is_as_it_was(p):
    override(p, "sample", lambda: "ours")
    override(p, "sample", lambda: "ours again")
    assert p.sample() == "ours again"
    let_go(p)
    assert vars(p) == {}


def test_what_another_extension_had_put_there_before_is_there_again(p):
    neighbour(p)
    found = p.sample
    override(p, "sample", lambda: "ours")
    let_go(p)
    assert p.sample is found
    assert p.sample() == "neighbour of the host's"


def test_what_another_extension_has_put_there_since_stays_and_calls_the_hosts(p):
    override(p, "sample", lambda: "ours")
    override(p, "sample", lambda: "ours again")
    neighbour(p)
    assert p.sample() == "neighbour of ours again"
    let_go(p)
    assert p.sample() == "neighbour of the host's"
    assert list(vars(p)) == ["sample"]


def test_letting_go_of_a_copy_leaves_the_original_held(p):
    override(p, "sample", lambda: "ours")
    other = copy(p)
    let_go(other)
    assert other.sample() == "the host's"
    assert p.sample() == "ours"
    let_go(p)
    assert vars(p) == {}
