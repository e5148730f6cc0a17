"""AUTOMATIC1111's option to store weights in 8 bits.

Without live previews: on a CPU the host computes in bfloat16 then, of which its previews cannot be made.
"""

import pytest
from host import same, tag


@pytest.fixture(scope="module")
def plain(host):
    """Of the checkpoint loaded anew: its very first load differs from any later one by a grey level, without K-LoRA too."""
    with host.options(fp8_storage="Enable"):
        pass
    return host.picture()


@pytest.mark.parametrize("cached", [False, True])
def test_fp8_storage_keeps_the_promises(host, plain, fused, cached):
    with host.options(live_previews_enable=False, cache_fp16_weight=cached, fp8_storage="Enable"):
        plain_fp8 = host.picture()
        assert not same(plain_fp8, plain)
        for role, selector in (("subject", "Subject only"), ("style", "Style only")):
            assert same(host.picture({**host.pair, "selector": selector}), host.picture(prompt="a cat" + tag(host.pair[role])))
        assert same(host.picture({**host.pair, "selector": "Direct merge"}), host.picture(prompt="a cat" + tag(host.subject) + tag(host.style)))
        fused_fp8 = host.picture(host.pair)
        assert same(host.picture(host.pair), fused_fp8)
        assert same(host.picture(), plain_fp8)
    assert same(host.picture(host.pair), fused)
