"""Requests that schemathesis makes from the OpenAPI page: the answers are as documented and nothing is answered with 500.

`KLORA_HOST_URL` names a running WebUI to ask as well.
"""

import os

import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from test_api import NAMES, client, registry  # noqa: E402, F401

OURS = "^/klora/v1/"


def of_the_routes_alone():
    from fastapi import FastAPI

    from klora.webui import api

    app = FastAPI()
    api.register(None, app)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture
def page(shared):
    return of_the_routes_alone()


schema = schemathesis.pytest.from_fixture("page").include(path_regex=OURS)


def assert_documented(case, answer):
    assert answer.status_code in (200, 405, 406, 413, 415, 422, 503), answer.text
    if case.path.endswith("analyze") and case.method == "POST" and answer.status_code != 200:
        assert isinstance(answer.json()["detail"], str)


@schema.parametrize()
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_the_routes_of_the_page(case, registry):  # noqa: F811
    if isinstance(case.body, dict) and case.body.get("subject"):
        case.body.update(NAMES)
    assert_documented(case, case.call())


if os.environ.get("KLORA_HOST_URL"):
    running = schemathesis.openapi.from_url(os.environ["KLORA_HOST_URL"] + "/openapi.json").include(path_regex=OURS)

    @running.parametrize()
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    def test_the_routes_of_a_running_host(case):
        assert_documented(case, case.call())
