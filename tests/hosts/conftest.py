"""Every test here runs against the stand-in, and against the host that KLORA_HOST_URL names if it names one."""

import pytest
from host import RunningHost, same
from standin import StandIn

from klora.webui import paths

RUNNING = RunningHost.from_environment()


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    return StandIn(tmp_path_factory.mktemp("webui"))


@pytest.fixture(scope="module", params=["stand-in", *(["running"] if RUNNING else [])])
def host(request):
    if request.param == "running":
        yield RUNNING
        return
    standin = request.getfixturevalue("standin")
    with standin.in_place(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "EXTENSION", standin.folder)
        yield standin


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
