"""What is said, shown and saved of what was really applied, and the options that govern it."""

import threading
import time

import numpy as np
import pytest
from host import SAME_MODULES, as_base64, pixels, same, tag
from PIL import Image
from plans import plan_of

from klora.core.changes import as_changes
from klora.level_colours import SUBJECT

HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "None", **SAME_MODULES}


def applied(answer):
    return answer["info"]["extra_generation_params"]["K-LoRA applied"]


def record_of(plan, ran=None):
    """What is told of a pass of which the steps in the range `ran` ran, all of them if it is None."""
    levels = plan.strengths.astype(np.int8)
    for step in set(range(plan.steps)) - set(ran or range(plan.steps)):
        levels[step] = -1
    return as_changes(levels)


@pytest.mark.parametrize("method", ["K-LoRA", "Random", "Direct merge"])
def test_the_recorded_map_is_the_plan(host, method):
    answer = host.answer({**host.pair, "method": method})
    record = record_of(plan_of(host, 4, seed=42, method=method))
    assert applied(answer) == [{"pass": "first", "batch": 0, **record}]
    assert not any("K-LoRA applied" in infotext for infotext in answer["info"]["infotexts"])


def test_each_pass_of_each_batch_is_recorded(host):
    answer = host.answer(host.pair, n_iter=2, **HIRES)
    first, hires = record_of(plan_of(host, 4)), record_of(plan_of(host, 6), range(2, 6))
    assert applied(answer) == [
        {"pass": name, "batch": batch, **record}
        for batch in (0, 1)
        for name, record in (("first", first), ("hires", hires))
    ]


def test_of_img2img_the_steps_before_its_noise_level_are_blank(host, plain):
    answer = host.answer(host.pair, init_images=[as_base64(plain)], denoising_strength=0.5)
    record = record_of(plan_of(host, 4), range(1, 4))
    assert applied(answer) == [{"pass": "first", "batch": 0, **record}]


def test_without_klora_nothing_is_recorded(host):
    assert "K-LoRA applied" not in host.answer()["info"]["extra_generation_params"]


def interrupted(host, **fields):
    """The answer of a run that is interrupted once the denoiser has been evaluated."""
    answers = []
    host.counts()
    thread = threading.Thread(
        target=lambda: answers.append(host.answer(host.pair, **{"steps": 150, **fields}))
    )
    thread.start()
    while not host.counts().get("forward"):
        time.sleep(0.02)
    host.call("/sdapi/v1/interrupt", {})
    thread.join()
    return answers[0]


def test_after_an_interrupt_the_steps_that_did_not_run_are_blank(host):
    (only,) = applied(interrupted(host))
    ran = int(only["ran"].rpartition("-")[2]) + 1
    assert 0 < ran < 150
    assert only == {"pass": "first", "batch": 0, **record_of(plan_of(host, 150), range(ran))}


def test_the_gallery_shows_no_map_by_default(host):
    assert len(host.answer(host.pair, n_iter=2)["images"]) == len(host.answer(n_iter=2)["images"])


def test_the_gallery_shows_the_map_behind_the_images_if_the_user_wants_it(host):
    without = host.answer(host.pair, n_iter=2, batch_size=2)
    with host.options(klora_map_in_gallery=True):
        answer = host.answer(host.pair, n_iter=2, batch_size=2)
        assert len(host.answer(n_iter=2)["images"]) == len(without["images"]) - 2
    *images, drawn = answer["images"]
    assert all(same(pixels(a), pixels(b)) for a, b in zip(images, without["images"], strict=True))
    assert (pixels(drawn)[..., :3] == SUBJECT).all(axis=-1).any()
    assert answer["info"]["index_of_first_image"] == without["info"]["index_of_first_image"]
    infotexts = [text.split("Version")[0] for text in answer["info"]["infotexts"]]
    assert infotexts[: len(images)] == [text.split("Version")[0] for text in without["info"]["infotexts"]]


def test_a_plot_is_left_without_maps(host):
    plot = host.grid("Seed", "42,43")
    without = host.answer(host.pair, **plot)
    with host.options(klora_map_in_gallery=True):
        answer = host.answer(host.pair, **plot)
    assert all(same(pixels(a), pixels(b)) for a, b in zip(answer["images"], without["images"], strict=True))


def test_the_map_is_saved_beside_each_image_if_the_user_wants_it(host, tmp_path):
    with host.options(samples_save=True, outdir_txt2img_samples=str(tmp_path), klora_map_saved=True):
        host.answer(host.pair, batch_size=2, save_images=True)
        host.answer(save_images=True)
        host.answer(host.pair)
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    maps = [path for path in saved if path.name.endswith("-klora-map.png")]
    assert len(saved) == 5
    assert len(maps) == 2
    assert all(path.with_name(path.name.replace("-klora-map", "")).exists() for path in maps)
    assert all(Image.open(path).width > 500 for path in maps)


def test_no_map_is_saved_by_default(host, tmp_path):
    with host.options(samples_save=True, outdir_txt2img_samples=str(tmp_path)):
        host.answer(host.pair, save_images=True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


GO_ON = "go on without K-LoRA"
FAULTS = {
    "no LoRA named": lambda host: {"subject": "no-such"},
    "must be a number from": lambda host: {"alpha": "high"},
    "the same LoRA": lambda host: {"style": host.subject},
}


@pytest.mark.parametrize("said", FAULTS)
def test_told_to_go_on_it_makes_the_hosts_own_image_and_says_why(host, said):
    wrong = FAULTS[said](host)
    prompt = "a cat" + tag(host.other, 0.7)
    expected = host.image(prompt=prompt)
    with host.options(klora_on_error=GO_ON):
        arrays, infotext = host.images({**host.pair, **wrong}, prompt=prompt)
    assert same(arrays[0], expected)
    assert "K-LoRA stopped: " in infotext
    assert said in infotext
    assert host.request({**host.pair, **wrong})[0] == 422


def test_told_to_go_on_when_the_host_cannot_load_a_lora_it_makes_the_hosts_own_images(host):
    expected = [host.image(seed=seed) for seed in (42, 43)]
    host.image(prompt="a cat" + tag(host.other))
    with host.options(klora_on_error=GO_ON), host.fault("load", 1, "RuntimeError", host.facts.places["load"]):
        arrays, infotext = host.images(host.pair, n_iter=2)
    assert all(same(a, b) for a, b in zip(arrays[-2:], expected, strict=True))
    assert "K-LoRA stopped: " in infotext
    assert any(said in infotext for said in ("did not load the subject LoRA", "a fault of the test in load"))
    assert "K-LoRA applied" not in infotext


def test_told_to_go_on_it_stops_all_the_same_once_sampling_runs(host):
    host.call("/klora-probe/v1/counts")
    with host.options(klora_on_error=GO_ON), host.fault("callback", 2, "RuntimeError"):
        status, answer = host.request(host.pair)
    assert status == 500
    assert "a fault of the test in callback" in answer["detail"]


def test_the_rules_of_the_options_hold_for_what_a_request_leaves_out_and_are_in_the_infotext(host):
    expected, infotext = host.images({**host.pair, "text_encoder": "none"})
    with host.options(klora_text_encoder="none"):
        arrays, by_option = host.images(host.pair)
        assert host.call("/klora/v1/schema")[1]["properties"]["text_encoder"]["default"] == "none"
        _, chosen = host.images({**host.pair, "text_encoder": "both"})
    assert same(arrays[0], expected[0])
    assert "K-LoRA text encoder: none" in by_option
    assert by_option == infotext
    assert "K-LoRA text encoder" not in chosen


def test_the_words_of_the_options_tell_an_accelerator(host):
    with host.options(klora_accelerators=f"nothing, {host.style.upper()}"):
        warnings = host.answer(host.pair)["info"]["extra_generation_params"]["K-LoRA warnings"]
    assert f"The style LoRA {host.style}.safetensors looks like an accelerator" in warnings
