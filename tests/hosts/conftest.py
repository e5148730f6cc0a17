"""Every test here runs against the stand-in, and against the running host, if KLORA_HOST_URL names one."""

import pytest
from facts import FACTS
from host import RunningHost, same
from plans import references_of
from standin import StandIn

from klora.webui import paths

RUNNING = RunningHost.from_environment()
PRESENT = [FACTS["a1111"], *([RUNNING.facts] if RUNNING else [])]


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    return StandIn(tmp_path_factory.mktemp("webui"))


@pytest.fixture(scope="session")
def standin_sd15(tmp_path_factory):
    return StandIn(tmp_path_factory.mktemp("webui"), "sd15")


@pytest.fixture(scope="session")
def running():
    with RUNNING.ready():
        yield RUNNING


@pytest.fixture(scope="module")
def host(request):
    if request.param == "running":
        yield request.getfixturevalue("running")
        return
    standin = request.getfixturevalue(request.param)
    with standin.in_place(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "EXTENSION", standin.folder)
        yield standin


ON_SD15 = (
    "test_another_base",
    "test_dialects",
    "test_promises",
    "test_sizes",
    "test_text_encoders",
    "test_unlisted",
    "test_weights",
)
"""What is promised of images and depends on the base model. All else is tested on SDXL alone, for time."""


def pytest_generate_tests(metafunc):
    """Samplers, places of faults and the like are those of the hosts in this run; any others are skipped."""
    if "host" in metafunc.fixturenames and not hasattr(metafunc.module, "host"):
        also = ["standin_sd15"] if metafunc.module.__name__ in ON_SD15 else []
        hosts = ["standin", *also, *(["running"] if RUNNING else [])]
        metafunc.parametrize("host", hosts, indirect=True, scope="module")
    of_hosts = {
        "timed": [timed for facts in PRESENT for clocks in facts.clocks.values() for timed in clocks],
        "place": [place for facts in PRESENT for place in facts.places],
        "retried_place": [place for facts in PRESENT for place, faults in facts.places.items() if faults > 1],
        "upscaler": [upscaler for facts in PRESENT for upscaler in facts.upscalers],
        "storage": [storage for facts in PRESENT for storage in facts.storages],
    }
    for name in set(of_hosts) & set(metafunc.fixturenames):
        values = list(dict.fromkeys(of_hosts[name]))
        metafunc.parametrize(
            f"any_{name}",
            values,
            ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
        )


def of_this_host(value, known):
    if value not in known:
        pytest.skip("this host has none of it")
    return value


@pytest.fixture
def timed(any_timed, host):
    """(sampler, steps asked for)."""
    return of_this_host(any_timed, host.clocks)


@pytest.fixture
def place(any_place, host):
    return of_this_host(any_place, host.facts.places)


@pytest.fixture
def retried_place(any_retried_place, host):
    return of_this_host(
        any_retried_place, [place for place, faults in host.facts.places.items() if faults > 1]
    )


@pytest.fixture
def upscaler(any_upscaler, host):
    return of_this_host(any_upscaler, host.facts.upscalers)


@pytest.fixture
def storage(any_storage, host):
    return of_this_host(any_storage, host.facts.storages)


@pytest.fixture(scope="module")
def plain(host):
    """An image without K-LoRA, before anything else."""
    return host.image()


@pytest.fixture(scope="module")
def fused(host, plain):
    return host.image(host.pair)


@pytest.fixture(scope="module")
def references(host):
    return references_of(host)


@pytest.fixture(autouse=True)
def off_is_the_host_bit_for_bit(host, plain):
    """After every single test an image without K-LoRA is what it was before the first."""
    yield
    assert same(host.image(), plain)
