"""The card and the selection map in the page of a running WebUI, before and after a generation."""

import json
import re

import pytest
from webui_page import (
    STYLE,
    SUBJECT,
    URL,
    choose,
    control,
    generate,
    open_page,
    own,
    paste,
    set_number,
    shot,
    switch_on,
    value,
)

VIEW = control("view")
ANALYZE = """async ([names, settings]) => {
    const headers = {"Content-Type": "application/json"};
    const post = async (path, body) => {
        const answer = await fetch(path, {method: "POST", headers, body: JSON.stringify(body)});
        return answer.json();
    };
    const {alphaM, comparisons, levels} = JSON.parse(document.querySelector(".klora-view").dataset.constants);
    const pair = await post("./klora/internal/scores", names), differing = [];
    for (const one of settings) {
        const server = await post("./klora/v1/analyze", {...names, ...one}), rule = comparisons[one.method];
        const s = klora.scheduleValues(one, alphaM), gamma = klora.gammaOf(pair, one.gamma);
        const rows = rule ? klora.compared(rule, pair, s, gamma, levels) :
            klora.rowsOf(await post("./klora/internal/strengths", {...names, ...one}), levels);
        const strengths = rows.map(row => [...row].map(code => [levels[code].subject, levels[code].style]));
        if (JSON.stringify(server.strengths) !== JSON.stringify(strengths)) differing.push(one);
    }
    return differing;
}"""


def with_pair(page, steps=20):
    """The page with the pair chosen, its card and its map."""
    set_number(page, "#txt2img_steps", steps)
    switch_on(page)
    choose(page, "subject", SUBJECT)
    choose(page, "style", STYLE)
    page.wait_for_selector(f"{VIEW} .klora-cells >> visible=true")
    page.wait_for_timeout(500)
    return page


def open_advanced(page):
    page.click(f"{control('advanced')} >> text=Advanced")
    page.wait_for_timeout(500)


def drawing(page):
    return page.evaluate(f"document.querySelector('{VIEW} .klora-cells').toDataURL()")


def title(page):
    return page.inner_text(f"{VIEW} .klora-title")


def asked(page):
    """A list to which every request of the page to the server from now on is added."""
    requests = []
    page.on(
        "request",
        lambda request: (
            requests.append(request.url.removeprefix(URL)) if not request.url.startswith("data:") else None
        ),
    )
    return requests


def of_panel(requests):
    return [path for path in requests if "/klora/" in path]


def test_nothing_is_asked_until_a_lora_is_chosen_then_its_card_then_the_map(page):
    requests = asked(page)
    switch_on(page)
    page.wait_for_timeout(1000)
    assert not of_panel(requests)
    choose(page, "subject", SUBJECT)
    page.wait_for_function(f"document.querySelector('{VIEW}').innerText.includes('network alpha')")
    assert not page.is_visible(f"{VIEW} .klora-cells")
    choose(page, "style", STYLE)
    page.wait_for_selector(f"{VIEW} .klora-cells >> visible=true")
    page.wait_for_timeout(500)
    shot(page, "panel")
    card = page.inner_text(f"{VIEW} .klora-card")
    assert all(
        part in card for part in (SUBJECT, STYLE, "kohya keys", "layers both change", "γ", "subject's share")
    )
    assert re.fullmatch(r"K-LoRA, S = 1\.5 t/T \+ 0\.5, γ [\d.]+, 4 steps", title(page))
    assert page.get_attribute(f"{VIEW} .klora-cells", "aria-label").startswith("Selection map. ")


def follow(page, acts):
    """Do each act and wait for the title that it makes; every map must differ from those before."""
    seen = [drawing(page)]
    for act, said in acts:
        act()
        page.wait_for_function(
            "([place, said]) => document.querySelector(place).innerText.includes(said)",
            arg=[f"{VIEW} .klora-title", said],
        )
        page.wait_for_timeout(150)
        assert drawing(page) not in seen, said
        seen.append(drawing(page))


def test_every_setting_of_the_plan_redraws_the_map_and_asks_the_server_nothing(page):
    with_pair(page)
    open_advanced(page)
    requests = asked(page)
    acts = (
        (lambda: set_number(page, control("alpha"), 3), "S = 3 t/T + 0.5"),
        (lambda: choose(page, "beta", "0.9"), "S = 3 t/T + 0.9"),
        (lambda: choose(page, "gamma", "2"), "γ 2,"),
        (lambda: choose(page, "schedule", "s*"), "S* = (3 t/T + 0.9) mod 1.5"),
        (lambda: set_number(page, "#txt2img_steps", 30), "30 steps"),
        (lambda: choose(page, "method", "Fixed"), "Fixed"),
    )
    follow(page, acts)
    assert requests == []


def test_a_plan_whose_rule_the_page_does_not_know_is_asked_for_once(page):
    with_pair(page)
    open_advanced(page)
    requests = asked(page)
    acts = (
        (lambda: choose(page, "method", "LoRA Switch"), "LoRA Switch"),
        (lambda: choose(page, "method", "Random"), "Generate draws the real one"),
        (lambda: choose(page, "method", "Direct merge"), "Direct merge"),
    )
    follow(page, acts)
    assert "both LoRAs" in page.inner_text(f"{VIEW} .klora-legend")
    choose(page, "method", "LoRA Switch")
    page.wait_for_function(
        f"document.querySelector('{VIEW} .klora-title').innerText.startsWith('LoRA Switch')"
    )
    page.wait_for_timeout(500)
    assert [path.lstrip(".") for path in of_panel(requests)] == ["/klora/internal/strengths"] * 3


def test_only_k_scale_has_the_pair_scored_again(page):
    with_pair(page)
    open_advanced(page)
    requests, before = asked(page), drawing(page)
    set_number(page, control("k_scale"), 5)
    page.wait_for_function(
        "([place, before]) => document.querySelector(place).toDataURL() !== before",
        arg=[f"{VIEW} .klora-cells", before],
    )
    assert [path.lstrip(".") for path in of_panel(requests)] == [
        "/klora/internal/card",
        "/klora/internal/scores",
    ]


def test_the_page_chooses_as_the_server_does(page):
    grid = [
        {
            "method": method,
            "schedule": schedule,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "steps": steps,
        }
        for method in ("K-LoRA", "Frobenius", "Top-K with γ", "Random", "Fixed")
        for schedule, alpha, beta in (("s", 1.5, 0.5), ("s*", 1.5, 1.3), ("s", -0.7, 2))
        for gamma in ("auto", "off", 0.8)
        for steps in (4, 15)
    ]
    assert page.evaluate(ANALYZE, [{"subject": SUBJECT, "style": STYLE}, grid]) == []


def test_a_layer_is_described_by_pointing_at_it_and_by_keyboard(page):
    with_pair(page)
    box = page.query_selector(f"{VIEW} .klora-cells").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)
    tip = page.inner_text(f"{VIEW} .klora-tip")
    assert all(part in tip for part in ("step ", "largest: subject ", "ratio subject ÷ γ · style", "switch"))
    page.mouse.move(1, 1)
    assert not page.is_visible(f"{VIEW} .klora-tip")
    page.focus(f"{VIEW} .klora-cells")
    page.keyboard.press("ArrowRight")
    first = page.inner_text(f"{VIEW} .klora-tip b")
    page.keyboard.press("ArrowRight")
    assert page.inner_text(f"{VIEW} .klora-tip b") != first


def test_the_map_can_be_read_as_text(page):
    with_pair(page)
    page.click(f"{VIEW} .klora-as-text summary")
    rows = page.query_selector_all(f"{VIEW} .klora-text tbody tr")
    assert rows[0].inner_text().startswith(("down", "double", "in"))
    assert sum(int(row.query_selector("td").inner_text()) for row in rows) > 0
    assert "layers never switch" in page.inner_text(f"{VIEW} .klora-text p")


def test_a_trigger_word_goes_into_the_prompt_once(page):
    def with_words(route):
        answer = route.fetch()
        card = answer.json()
        card["subject"]["words"] = ["sks dog", "sitting"]
        route.fulfill(response=answer, json=card)

    page.route("**/klora/internal/card", with_words)
    page.fill("#txt2img_prompt textarea", "a cat")
    with_pair(page)
    page.click(f"{VIEW} button >> text=sks dog")
    assert page.input_value("#txt2img_prompt textarea") == "a cat, sks dog"
    page.click(f"{VIEW} button >> text=add all")
    assert page.input_value("#txt2img_prompt textarea") == "a cat, sks dog, sitting"
    assert page.get_attribute(f"{VIEW} button >> text=sks dog", "aria-pressed") == "true"


def test_s_star_is_offered_for_flux_and_one_press_sets_it(page):
    told = {"base": "FLUX", "schedule": "s*", "advice": "For FLUX the schedule S* is recommended."}

    def for_flux(route):
        answer = route.fetch()
        card = answer.json()
        for role in ("subject", "style"):
            card[role] = card[role] and {**card[role], **told}
        route.fulfill(response=answer, json=card)

    page.route("**/klora/internal/card", for_flux)
    with_pair(page)
    shot(page, "flux")
    assert not page.is_visible(control("preset"))
    page.click(f"{VIEW} .klora-offer button")
    page.wait_for_function(
        f"document.querySelector('{VIEW} .klora-title').innerText.includes('S* = (1.5 t/T + 1.3)')"
    )
    assert not page.is_visible(f"{VIEW} .klora-offer")
    assert value(page, "schedule") == "s*"


def recorded(page):
    """What the host says about the last run; skips if it says nothing."""
    info = json.loads(page.input_value("#generation_info_txt2img textarea"))
    if "K-LoRA applied" not in info["extra_generation_params"]:
        pytest.skip("this version does not record what it applied")
    return info["extra_generation_params"]["K-LoRA applied"]


def test_after_an_image_the_map_is_what_was_applied(page):
    with_pair(page, steps=6)
    planned = drawing(page)
    generate(page)
    assert len(recorded(page)) == 1
    page.wait_for_function(
        f"document.querySelector('{VIEW} .klora-title').innerText.startsWith('last image')"
    )
    shot(page, "applied")
    assert title(page) == "last image: 6 of 6 steps ran, all as planned"
    assert drawing(page) == planned
    page.click(f"{VIEW} .klora-choices button >> text=planned")
    assert title(page).startswith("K-LoRA, S = ")
    page.click(f"{VIEW} .klora-choices button >> text=applied")
    open_advanced(page)
    choose(page, "method", "Fixed")
    page.wait_for_function(f"document.querySelector('{VIEW} .klora-title').innerText.startsWith('Fixed')")


def test_steps_that_an_interrupt_left_out_are_blank(page):
    def interrupt():
        page.wait_for_selector("#txt2img_interrupt >> visible=true")
        page.wait_for_timeout(4000)
        page.click("#txt2img_interrupt")

    with_pair(page, steps=60)
    generate(page, interrupt)
    ran = int(recorded(page)[0]["ran"].rpartition("-")[2]) + 1
    assert 0 < ran < 60
    page.wait_for_function(
        f"document.querySelector('{VIEW} .klora-title').innerText.startsWith('last image')"
    )
    shot(page, "interrupted")
    assert title(page) == f"last image: {ran} of 60 steps ran, all as planned"
    assert "did not run" in page.inner_text(f"{VIEW} .klora-legend")


def test_a_pasted_text_draws_its_map(page):
    text = (
        "a dog\nSteps: 7, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 128x128, "
        f"K-LoRA subject: {STYLE}, K-LoRA style: {SUBJECT}, "
        "K-LoRA schedule: s*, K-LoRA alpha: 2, K-LoRA gamma: off"
    )
    paste(page, text)
    page.wait_for_function(
        f"document.querySelector('{VIEW} .klora-title')?.innerText === "
        "'K-LoRA, S* = (2 t/T + 1.3) mod 1.5, γ 1, 7 steps'"
    )


@pytest.mark.parametrize(
    ("name", "query", "width"),
    [
        ("light", "?__theme=light", 1400),
        ("dark", "?__theme=dark", 1400),
        ("narrow", "?__theme=light", 390),
    ],
)
def test_light_dark_and_narrow(browser, name, query, width):
    page, errors = open_page(browser, query, width)
    with_pair(page)
    page.query_selector(VIEW).scroll_into_view_if_needed()
    shot(page, f"panel_{name}")
    inside = page.evaluate(
        f"document.querySelector('{VIEW}').scrollWidth <= document.querySelector('{VIEW}').clientWidth + 1"
    )
    assert inside
    page.close()
    assert not own(errors)
