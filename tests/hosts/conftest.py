"""Every test here runs against the host that KLORA_HOST_URL names."""

import pytest
from host import RunningHost, same

RUNNING = RunningHost.from_environment()


@pytest.fixture(scope="module", params=["running"])
def host(request):
    if RUNNING is None:
        pytest.skip("KLORA_HOST_URL names no running WebUI")
    return RUNNING


@pytest.fixture(scope="module")
def plain(host):
    """A picture without K-LoRA, before anything else."""
    return host.picture()


@pytest.fixture(scope="module")
def fused(host, plain):
    return host.picture(host.pair)


@pytest.fixture(autouse=True)
def off_is_the_host_bit_for_bit(host, plain):
    """After every single test a picture without K-LoRA is what it was before the first."""
    yield
    assert same(host.picture(), plain)
