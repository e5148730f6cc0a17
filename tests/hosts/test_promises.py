"""The promises of K-LoRA in a WebUI, through its HTTP API.

docs/developing.md tells how to run them against a running one.

KLORA_HOST_URL=http://127.0.0.1:7860 KLORA_HOST_FOLDER=/path/to/webui pytest tests/hosts
"""

import json
import threading
from contextlib import contextmanager
from shutil import rmtree

import pytest
from host import LISTS, complaint, pixels, replaced, same, tag
from safetensors.torch import load_file

from klora.__main__ import main
from klora.core import file_state


@pytest.mark.parametrize("weight", [1, 0.8, -0.5, 0])
def test_one_lora_alone_is_the_hosts_own_tag(host, weight):
    expected = host.image(prompt="a cat" + tag(host.subject, weight))
    assert same(host.image({**host.pair, "method": "Subject only", "subject_weight": weight}), expected)
    expected = host.image(prompt="a cat" + tag(host.style, weight))
    assert same(host.image({**host.pair, "method": "Style only", "style_weight": weight}), expected)


def test_direct_merge_is_both_tags(host):
    expected = host.image(prompt="a cat" + tag(host.subject) + tag(host.style))
    assert same(host.image({**host.pair, "method": "Direct merge"}), expected)


def test_klora_repeats_exactly_and_is_none_of_the_others(host, plain, fused):
    assert same(fused, host.image(host.pair))
    for method in ("Subject only", "Style only", "Direct merge", "Random", "LoRA Switch"):
        assert not same(fused, host.image({**host.pair, "method": method}))
    assert not same(fused, plain)


def test_other_tags_of_the_prompt_apply_on_all_layers_beside_the_pair(host):
    expected = host.image(prompt="a cat" + tag(host.other, 0.5) + tag(host.subject))
    assert same(
        host.image({**host.pair, "method": "Subject only"}, prompt="a cat" + tag(host.other, 0.5)),
        expected,
    )


def warnings(answer):
    return answer["info"]["extra_generation_params"]["K-LoRA warnings"]


def test_a_chosen_lora_that_the_prompt_has_too_applies_once_and_that_is_said(host, fused):
    answer = host.answer(host.pair, prompt="a cat" + tag(host.subject, 0.3))
    assert same(pixels(answer["images"][0]), fused)
    assert "is applied once, by K-LoRA" in warnings(answer)
    assert "K-LoRA warnings" not in answer["info"]["infotexts"][0]
    assert "K-LoRA warnings" not in host.answer(host.pair)["info"]["extra_generation_params"]


@pytest.mark.parametrize(
    "word", ["lcm", "sdxl_lightning_4step", "Hyper-SDXL-8steps", "turbo 4 steps", "dmd2"]
)
def test_an_accelerator_as_a_style_is_said(host, word):
    name = f"klora_test_{word}"
    with host.more_loras(**{name: load_file(host.file(host.style))}):
        assert f"The style LoRA {name}.safetensors looks like an accelerator" in warnings(
            host.answer({**host.pair, "style": name})
        )


def test_infotext_names_both_with_their_hashes_and_what_is_not_default_and_nothing_else(host):
    _, info = host.images({**host.pair, "alpha": 2, "gamma": "off"})
    prompt, parameters = info.split("\n", 1)
    assert prompt == "a cat"
    assert f"K-LoRA subject: {host.subject}, K-LoRA subject hash: " in parameters
    assert f"K-LoRA style: {host.style}, K-LoRA style hash: " in parameters
    assert "K-LoRA alpha: 2, K-LoRA gamma: off" in parameters
    assert "Lora hashes" not in parameters
    assert parameters.count("K-LoRA") == 6


def test_infotext_given_to_the_api_makes_the_same_image(host):
    arrays, info = host.images(
        {
            **host.pair,
            "schedule": "s*",
            "subject_weight": 0.8,
            "text_encoder": "none",
            "gamma": 0.7,
            "beta": 0.9,
        }
    )
    status, answer = host.call("/sdapi/v1/txt2img", {"infotext": info, **LISTS})
    assert status == 200
    assert same(arrays[0], pixels(answer["images"][0]))


@pytest.mark.parametrize("args", [{"subject": "any"}, {}, "any"])
@pytest.mark.parametrize("name", ["K-LoRA", "k-lora"])
def test_arguments_that_are_no_list_answer_422_with_the_sentence(host, args, name):
    """The host itself fails on them (KeyError: 0), or takes one letter as one value."""
    for path in ("txt2img", "img2img"):
        status, answer = host.call(
            f"/sdapi/v1/{path}", {"prompt": "", "alwayson_scripts": {name: {"args": args}}}
        )
        assert status == 422
        assert "'args' of K-LoRA must be a list" in answer["detail"]


def test_a_second_dict_is_refused(host):
    status, answer = host.request([host.pair, {"alpha": 2}])
    assert status == 422
    assert "Value 2 of 'args' is a dict" in answer["detail"]


def test_a_name_with_a_tab_is_found_as_it_is_listed(host):
    with host.more_loras(**{"klora test\ttab": load_file(host.file(host.style))}):
        listed = next(
            lora["name"] for lora in host.call("/klora/v1/loras")[1] if "test\\ttab" in lora["name"]
        )
        expected = host.image(host.pair)
        assert same(host.image({**host.pair, "style": listed}), expected)
        arrays, info = host.images({**host.pair, "style": "klora test\ttab"})
        assert same(arrays[0], expected)
        assert "K-LoRA style: klora test%09tab" in info


@contextmanager
def namesakes(host):
    """With two files of one name in two folders."""
    folders = [host.file(host.style).parent / f"klora_test_{name}" for name in "ab"]
    try:
        for folder in folders:
            folder.mkdir()
            (folder / "klora_test_namesake.safetensors").write_bytes(host.file(host.style).read_bytes())
        host.call("/sdapi/v1/refresh-loras", {})
        yield
    finally:
        for folder in folders:
            rmtree(folder, ignore_errors=True)
        host.call("/sdapi/v1/refresh-loras", {})


def test_a_file_hidden_by_its_namesake_in_another_folder_is_said(host):
    """The hosts list the last one only."""
    with namesakes(host):
        answers = [
            host.request({**host.pair, "style": f"klora_test_{name}/klora_test_namesake"}) for name in "ab"
        ]
        plot = host.grid(
            "[K-LoRA] Style", ["klora_test_a/klora_test_namesake", "klora_test_b/klora_test_namesake"]
        )
        status, answer = host.request(host.pair, **plot)
    said = "only one LoRA named 'klora_test_namesake', the one in the folder 'klora_test_"
    assert sorted(status for status, _ in answers) == [200, 422]
    assert said in next(answer["detail"] for status, answer in answers if status == 422)
    assert status >= 400
    assert said in complaint(answer)


REFUSED = [
    ({"subject": "no-such"}, "no LoRA named 'no-such' (subject)"),
    ({"style": ""}, "No style LoRA is chosen"),
    ({"alhpa": 1}, "did you mean 'alpha'?"),
    ({"alpha": "high"}, "'alpha' (α) must be a number from -100 to 100"),
    ({"method": "klora"}, "did you mean 'K-LoRA'?"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_a_wrong_request_answers_4xx_with_the_sentence_and_no_image(host, settings, sentence):
    status, answer = host.request({**host.pair, **settings})
    assert status == 422
    assert sentence in answer["detail"]
    assert "images" not in answer


def test_one_lora_as_both_is_refused(host):
    status, answer = host.request({"subject": host.style, "style": host.style})
    assert status == 422
    assert "the same LoRA" in answer["detail"]


def test_positional_arguments_equal_the_dict(host):
    assert same(
        host.image([True, host.subject, host.style, 0.8]),
        host.image({**host.pair, "subject_weight": 0.8}),
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("when", [3600, 0, -3600])
def test_a_file_that_was_replaced_between_two_runs_is_the_one_applied(host, when, in_place, monkeypatch):
    """By a newer one, as trainers do, by an older one, as when restoring a copy, or by one of the same time.

    Nobody presses refresh.
    """
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)  # where the host is in this process
    before = load_file(host.file(host.subject))
    after = {key: -value if "up" in key or "lora_B" in key else value for key, value in before.items()}
    names = ("klora_test_replaced", "klora_test_after")
    with host.more_loras(**dict(zip(names, (before, after), strict=True))):
        first = host.image({"subject": names[0], "style": host.style})
        expected = host.image({"subject": names[1], "style": host.style})
        assert same(host.image({"subject": names[0], "style": host.style}), first)
        with replaced(host.file(names[0]), after, when, in_place):
            assert same(host.image({"subject": names[0], "style": host.style}), expected)
        assert same(host.image({"subject": names[0], "style": host.style}), first)
        assert not same(first, expected)


def test_xyz_over_method_gives_the_images_of_the_methods(host):
    methods = ["K-LoRA", "Subject only", "Style only"]
    arrays, _ = host.images(host.pair, **host.grid("[K-LoRA] Method", methods, "Seed", "42,43"))
    singles = [host.image({**host.pair, "method": name}, seed=seed) for seed in (42, 43) for name in methods]
    assert all(same(a, b) for a, b in zip(arrays[-6:], singles, strict=True))


def test_a_lora_of_the_prompt_applies_beside_the_pair_after_an_image_with_it_alone(host, fused):
    """The Forge family loads nothing where the prompt's LoRAs are those of the image before."""
    prompt = "a cat" + tag(host.other, 0.5)
    host.image(host.pair)
    expected = host.image(host.pair, prompt=prompt)
    host.image(prompt=prompt)
    assert same(host.image(host.pair, prompt=prompt), expected)
    assert not same(expected, fused)


def test_xyz_refuses_all_bad_values_before_the_first_image(host):
    status, answer = host.request(host.pair, **host.grid("[K-LoRA] γ", "auto,high"))
    assert status >= 400
    assert "'gamma' (γ) must be auto or off or a number" in complaint(answer)


def test_analyze_answers_the_plan_of_the_command_line(host, capsys):
    status, answer = host.call("/klora/v1/analyze", {**host.pair, "steps": 7, "schedule": "s*"})
    assert status == 200
    main(
        [
            "analyze",
            str(host.file(host.subject)),
            str(host.file(host.style)),
            "--steps",
            "7",
            "--schedule",
            "s*",
            "--json",
            "-",
        ]
    )
    assert answer == json.loads(capsys.readouterr().out)
    status, answer = host.call("/klora/v1/analyze", {**host.pair, "steps": 0})
    assert status == 422
    assert "'steps' must be a whole number" in answer["detail"]
    assert host.call("/klora/v1/analyze", {"subject": "../../config", "style": host.style})[0] == 422


def test_schema_and_list_are_in_the_hosts_openapi_page(host):
    assert {"/klora/v1/schema", "/klora/v1/loras", "/klora/v1/analyze"} <= set(
        host.call("/openapi.json")[1]["paths"]
    )
    assert host.call("/klora/v1/schema")[1]["title"] == "K-LoRA"
    assert {host.subject, host.style} <= {lora["name"] for lora in host.call("/klora/v1/loras")[1]}


def test_two_clients_at_once_each_get_what_they_would_alone(host, plain, fused):
    images = {"K-LoRA": [], "plain": []}

    def client(first):
        for name in (first, *images) * 2:
            images[name].append(host.image(host.pair if name == "K-LoRA" else None))

    clients = [threading.Thread(target=client, args=[first]) for first in images]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(images["K-LoRA"]) == len(images["plain"]) == 6
    assert all(same(image, fused) for image in images["K-LoRA"])
    assert all(same(image, plain) for image in images["plain"])


def test_after_reload_ui_all_is_as_before(host, plain, fused):
    host.reload()
    assert same(host.image(host.pair), fused)
    assert same(host.image(), plain)
    labels = host.plot()["args"][0]["choices"]
    assert len(labels) == len(set(labels))
    assert "[K-LoRA] Method" in labels
