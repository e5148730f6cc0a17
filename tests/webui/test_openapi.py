"""Right and wrong requests, made by schemathesis from the OpenAPI page, get documented answers, never a 500.

`KLORA_HOST_URL` names a running WebUI to ask as well.
"""

import os

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_api import NAMES, registry  # noqa: F401

from klora.webui import api

schemathesis = pytest.importorskip("schemathesis")
RUNNING = os.environ.get("KLORA_HOST_URL", "").rstrip("/")
ROUTES = [("/klora/v1/schema", "GET"), ("/klora/v1/loras", "GET"), ("/klora/v1/analyze", "POST")]
DOCUMENTED = {("/klora/v1/analyze", "POST"): {200, 413, 422, 503}}


@pytest.fixture(params=["routes alone", *(["running"] if RUNNING else [])])
def page(request, shared, registry):  # noqa: F811
    if request.param == "running":
        return schemathesis.openapi.from_url(f"{RUNNING}/openapi.json")
    app = FastAPI()
    api.register(app)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("route", ROUTES)
def test_whatever_is_sent_the_answer_is_one_of_the_documented(page, route, mode):
    operation = page[route[0]][route[1]]
    mode = schemathesis.GenerationMode[mode]
    if mode == schemathesis.GenerationMode.NEGATIVE and route not in DOCUMENTED:
        pytest.skip("takes nothing that could be wrong")

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def ask(case, known):
        if known and isinstance(case.body, dict):
            case.body.update(NAMES)
        answer = case.call()
        assert answer.status_code in DOCUMENTED.get(route, {200}), answer.text
        if answer.status_code != 200:
            assert isinstance(answer.json()["detail"], str)

    ask()
