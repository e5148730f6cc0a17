"""A checkpoint of a base model that nobody listed fuses by the host's own names for its weights.

The tables of listed models are switched off in the host, so that its checkpoint becomes such a one.
"""

from contextlib import contextmanager

import pytest
from host import PROBE_MISSING, same, tag
from plans import assert_follows, plan_of

from klora.core.families import FAMILIES

TABLES = {"all tables": tuple(FAMILIES), "its own table": None}


@contextmanager
def without_tables(host, keys):
    """With K-LoRA knowing none of these families."""
    try:
        assert host.call("/klora-probe/v1/tables", {"off": list(keys)})[0] == 200, PROBE_MISSING
        yield
    finally:
        host.call("/klora-probe/v1/tables", {"off": []})


@pytest.fixture(params=TABLES)
def switched_off(request, host):
    return TABLES[request.param] or (host.base,)


def test_it_has_the_plan_and_the_images_of_its_table(host, plain, fused, references, switched_off):
    if host.base == "lumina_2":
        pytest.skip("its host cuts q, k and v of this model into three equal parts, which they are not")
    plans = {schedule: plan_of(host, 4, schedule=schedule) for schedule in ("s", "s*")}
    prompts = {
        "Direct merge": "a cat" + tag(host.subject) + tag(host.style),
        "Subject only": "a cat" + tag(host.subject),
    }
    with without_tables(host, switched_off):
        for schedule, plan in plans.items():
            assert_follows(host.weights({**host.pair, "schedule": schedule}), plan, range(4), references)
        assert same(host.image(host.pair), fused)
        for method, prompt in prompts.items():
            assert same(host.image({**host.pair, "method": method}), host.image(prompt=prompt))
        assert same(host.image(), plain)
        assert all(call == references[None] for call in host.weights())
    assert same(host.image(host.pair), fused)


def test_the_panel_says_that_the_webui_listed_it(host, switched_off):
    with without_tables(host, switched_off):
        status, card = host.call("/klora/internal/card", host.pair)
    assert status == 200
    listed = {card[part]["base"] for part in ("checkpoint", "subject", "style")}
    assert len(listed) == 1
    assert listed.pop().endswith(" (listed by the WebUI's own names)")
