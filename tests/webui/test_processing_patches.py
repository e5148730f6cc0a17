"""K-LoRA's patches on the host's processing object are gone once undone, whoever else patches it."""

from copy import copy

import pytest

from klora.webui.processing_patches import ProcessingPatches, undo_all


class Processing:
    def sample(self):
        return "the host's"


@pytest.fixture
def p():
    return Processing()


def saying(text):
    """A method of K-LoRA's, which gets the one whose place it takes."""
    return lambda _original: text


def other_extension(p):
    """Have another extension wrap the method that is there."""
    own = p.sample
    p.sample = lambda: f"other_extension of {own()}"


def test_afterwards_the_object_is_as_it_was(p):
    patches = ProcessingPatches(p)
    patches.put("sample", saying("ours"))
    patches.put("sample", lambda original: f"ours again, then {original()}")
    assert p.sample() == "ours again, then ours"
    patches.undo()
    assert vars(p) == {}
    patches.undo()
    assert vars(p) == {}


def test_what_another_extension_had_put_there_before_is_there_again(p):
    other_extension(p)
    found = p.sample
    patches = ProcessingPatches(p)
    patches.put("sample", saying("ours"))
    patches.undo()
    assert p.sample is found
    assert p.sample() == "other_extension of the host's"


def test_what_another_extension_has_put_there_since_stays_and_calls_the_hosts(p):
    patches = ProcessingPatches(p)
    patches.put("sample", saying("ours"))
    patches.put("sample", saying("ours again"))
    other_extension(p)
    assert p.sample() == "other_extension of ours again"
    patches.undo()
    assert p.sample() == "other_extension of the host's"
    assert list(vars(p)) == ["sample"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_owner_undoes_its_own_in_whatever_order(p, order):
    owners = []
    for text in ("first", "second"):
        owners.append(ProcessingPatches(p))
        owners[-1].put("sample", saying(text))
    owners[order[0]].undo()
    assert p.sample() == ("second", "first")[order[0]]
    owners[order[1]].undo()
    assert vars(p) == {}


def test_whatever_owners_that_died_have_left_can_be_undone(p):
    ProcessingPatches(p).put("sample", saying("of a run that died"))
    ProcessingPatches(p).put("sample", saying("of another"))
    other_extension(p)
    undo_all(p)
    assert p.sample() == "other_extension of the host's"
    assert list(vars(p)) == ["sample"]


def test_freeing_a_copy_leaves_the_original_patched(p):
    patches = ProcessingPatches(p)
    patches.put("sample", saying("ours"))
    other = copy(p)
    undo_all(other)
    assert other.sample() == "the host's"
    assert p.sample() == "ours"
    patches.undo()
    assert vars(p) == {}
