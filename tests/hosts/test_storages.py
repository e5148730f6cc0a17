"""Checkpoints that the host stores with fewer bits; LoRAs are merged or added in every forward pass."""

import pytest
from host import same, tag
from plans import assert_follows, plan_of, references_of


@pytest.fixture(scope="module")
def plain(host):
    """An image of the checkpoint after it was loaded again.

    In A1111 its very first load differs from later ones by a grey level, without K-LoRA too.
    """
    with host.storing(next(iter(host.facts.storages))):
        pass
    return host.image()


def image_of_the_host_alone(host):
    """A host's own image in the storage that is set. torch 2.1 cannot make one with fp8 weights on a CPU."""
    status, answer = host.request()
    if status == 500 and "attn_mask dtype" in str(answer):
        pytest.skip("this host makes no image in this storage, without K-LoRA either")
    return host.image()


def test_every_storage_keeps_the_promises(host, plain, fused, storage):
    with host.storing(storage):
        plain_there = image_of_the_host_alone(host)
        subject, style = tag(host.subject), tag(host.style)
        tags = {"Style only": style, "Subject only": subject, "Direct merge": subject + style}
        for method, text in tags.items():
            assert same(host.image({**host.pair, "method": method}), host.image(prompt="a cat" + text))
        fused_there = host.image(host.pair)
        assert same(host.image(host.pair), fused_there)
        assert same(host.image(), plain_there)
        references = references_of(host)
        for schedule in ("s", "s*"):
            assert_follows(
                host.weights({**host.pair, "schedule": schedule}),
                plan_of(host, 4, schedule=schedule),
                [0, 1, 2, 3],
                references,
            )
        assert all(call == references[None] for call in host.weights())
    assert same(host.image(host.pair), fused)


def test_fewer_bits_make_another_image(host, plain, storage):
    """Checks that the option was in force, which an image without LoRAs does not show without fewer bits."""
    if "fp8" not in storage and "float8" not in storage:
        pytest.skip("it does not round")
    with host.storing(storage):
        assert not same(image_of_the_host_alone(host), plain)
