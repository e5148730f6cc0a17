"""The promises of K-LoRA in a running AUTOMATIC1111, through its HTTP API. README, "Developing", tells how to run it.

    KLORA_HOST_URL=http://127.0.0.1:7860 KLORA_HOST_FOLDER=/path/to/webui pytest tests/hosts
"""

import base64
import io
import threading
import time

import numpy as np
import pytest
from host import Host
from PIL import Image
from safetensors.torch import load_file, save_file

from klora.analysis import analyze
from klora.core.topology import sdxl_modules
from klora.settings import Settings

HOST = Host.from_environment()
pytestmark = pytest.mark.skipif(HOST is None, reason="KLORA_HOST_URL names no running WebUI")


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


@pytest.fixture(scope="module")
def plain():
    return HOST.picture()


@pytest.fixture(autouse=True)
def off_is_the_host_bit_for_bit(request, plain):
    """After every single test here a picture without K-LoRA is what it was before the first."""
    yield
    assert same(HOST.picture(), plain)


def tag(name, weight=1):
    return f"<lora:{name}:{weight}>"


@pytest.mark.parametrize("weight", [1, 0.8, -0.5, 0])
def test_one_lora_alone_is_the_hosts_own_tag(weight):
    expected = HOST.picture(prompt="a cat" + tag(HOST.subject, weight))
    assert same(HOST.picture({**HOST.pair, "selector": "Subject only", "subject_weight": weight}), expected)
    expected = HOST.picture(prompt="a cat" + tag(HOST.style, weight))
    assert same(HOST.picture({**HOST.pair, "selector": "Style only", "style_weight": weight}), expected)


def test_direct_merge_is_both_tags():
    expected = HOST.picture(prompt="a cat" + tag(HOST.subject) + tag(HOST.style))
    assert same(HOST.picture({**HOST.pair, "selector": "Direct merge"}), expected)


def test_klora_repeats_exactly_and_is_none_of_the_others(plain):
    fused = HOST.picture(HOST.pair)
    assert same(fused, HOST.picture(HOST.pair))
    for selector in ("Subject only", "Style only", "Direct merge", "Random", "LoRA Switch"):
        assert not same(fused, HOST.picture({**HOST.pair, "selector": selector}))
    assert not same(fused, plain)


CLOCKS = [
    ("Euler a", 4, [0, 1, 2, 3]),
    ("DPM++ 2M", 4, [0, 1, 2, 3]),
    ("DPM++ 2M SDE", 4, [0, 1, 2, 3]),
    ("Heun", 4, [0, 0, 1, 1, 2, 2, 3]),
    ("DPM++ SDE", 4, [0, 0, 1, 1, 2, 2, 3]),
    ("DPM2 a", 3, [0, 0, 1, 1, 2]),
    ("UniPC", 4, [0, 1, 2, 3]),
    ("PLMS", 4, [0, 1, 2, 3]),
    ("DDIM", 4, [0, 1, 2]),
    ("Euler a", 1, [0]),
    ("Euler a", 30, list(range(30))),
]


def plan_of(steps, **settings):
    return analyze(HOST.file(HOST.subject), HOST.file(HOST.style), Settings.parse(settings), steps=steps).plan


def expected_names(plan, step):
    names, layers = [HOST.style, HOST.subject], ["diffusion_model_" + layer.replace(".", "_") for layer in plan.layer_names]
    return {layer: [names[choice]] for layer, choice in zip(layers, plan.selection[step], strict=True)}


def assert_applied(calls, plan, clock):
    assert len(calls) == len(clock)
    for seen, step in zip(calls, clock, strict=True):
        wanted = expected_names(plan, step)
        assert {layer: seen[layer] for layer in wanted} == wanted
        assert not any(names for layer, names in seen.items() if layer not in wanted)


@pytest.mark.parametrize(("sampler", "steps", "clock"), CLOCKS)
@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_every_layer_has_what_the_plan_says_at_every_evaluation(sampler, steps, clock, schedule):
    HOST.picture()
    HOST.applied()
    HOST.picture({**HOST.pair, "schedule": schedule}, sampler_name=sampler, steps=steps)
    calls, applies = HOST.applied()
    plan = plan_of(steps, schedule=schedule)
    assert_applied(calls, plan, clock)
    switches = sum(map(len, plan.switches()))
    assert applies <= len(plan.layer_names) + switches


@pytest.mark.parametrize(("rule", "steps", "clock"), [("continue", 6, [2, 3, 4, 5]), ("restart", 4, [0, 1, 2, 3])])
def test_hires_pass_follows_its_rule(rule, steps, clock):
    HOST.applied()
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "Latent"}
    first = HOST.picture({**HOST.pair, "hires": rule}, **hires)
    calls, _ = HOST.applied()
    assert_applied(calls[:4], plan_of(4), [0, 1, 2, 3])
    assert_applied(calls[4:], plan_of(steps), clock)
    assert same(first, HOST.picture({**HOST.pair, "hires": rule}, **hires))


def test_hires_off_leaves_both_out_of_the_second_pass():
    HOST.applied()
    HOST.picture({**HOST.pair, "hires": "off"}, enable_hr=True, hr_scale=1.5, denoising_strength=0.6, hr_upscaler="Latent")
    calls, _ = HOST.applied()
    assert_applied(calls[:4], plan_of(4), [0, 1, 2, 3])
    assert not any(any(call.values()) for call in calls[4:])


def test_img2img_continues_where_the_noise_level_stands(plain):
    buffer = io.BytesIO()
    Image.fromarray(plain).save(buffer, "PNG")
    HOST.applied()
    HOST.picture(HOST.pair, init_images=[base64.b64encode(buffer.getvalue()).decode()], denoising_strength=0.5)
    calls, _ = HOST.applied()
    assert_applied(calls, plan_of(4), [1, 2, 3])


@pytest.mark.parametrize("fields", [
    {"prompt": "a [cat:dog:0.5]"}, {"prompt": "a cat AND a dog"}, {"cfg_scale": 1}, {"prompt": "a cat " * 60}, {"n_iter": 2}, {"batch_size": 2},
    {"s_min_uncond": 4.0},
])  # fmt: skip
def test_prompts_and_batches_of_all_kinds_keep_the_clock(fields):
    HOST.applied()
    HOST.pictures(HOST.pair, **fields)
    calls, _ = HOST.applied()
    runs = fields.get("n_iter", 1)
    for run in range(runs):
        assert_applied(calls[4 * run : 4 * run + 4], plan_of(4), [0, 1, 2, 3])


def test_skip_early_cfg_keeps_the_clock():
    HOST.call("/sdapi/v1/options", {"skip_early_cond": 0.5})
    try:
        HOST.applied()
        HOST.picture(HOST.pair)
        assert_applied(HOST.applied()[0], plan_of(4), [0, 1, 2, 3])
    finally:
        HOST.call("/sdapi/v1/options", {"skip_early_cond": 0.0})


def test_other_tags_of_the_prompt_apply_on_all_layers_beside_the_pair():
    other = "xl_style_attn"
    expected = HOST.picture(prompt=f"a cat<lora:{other}:0.5><lora:{HOST.subject}:1>")
    assert same(HOST.picture({**HOST.pair, "selector": "Subject only"}, prompt=f"a cat<lora:{other}:0.5>"), expected)


def test_a_chosen_lora_that_the_prompt_has_too_applies_once():
    fused = HOST.picture(HOST.pair)
    assert same(HOST.picture(HOST.pair, prompt="a cat" + tag(HOST.subject, 0.3)), fused)


def test_infotext_names_both_with_their_hashes_and_what_is_not_default_and_nothing_else():
    _, info = HOST.pictures({**HOST.pair, "alpha": 2, "gamma": "off"})
    prompt, parameters = info.split("\n", 1)
    assert prompt == "a cat"
    assert f"K-LoRA subject: {HOST.subject}, K-LoRA subject hash: " in parameters
    assert f"K-LoRA style: {HOST.style}, K-LoRA style hash: " in parameters
    assert "K-LoRA alpha: 2, K-LoRA gamma: off" in parameters
    assert "Lora hashes" not in parameters
    assert parameters.count("K-LoRA") == 6


def test_infotext_given_to_the_api_makes_the_same_picture():
    arrays, info = HOST.pictures({**HOST.pair, "schedule": "s*", "subject_weight": 0.8, "text_encoder": "none", "gamma": 0.7, "beta": 0.9})
    status, answer = HOST.call("/sdapi/v1/txt2img", {"infotext": info})
    assert status == 200
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))))
    assert same(arrays[0], again)


REFUSED = [
    ({"subject": "no-such", "style": "xl_style"}, "no LoRA named 'no-such' (subject)"),
    ({"subject": "xl_style", "style": "xl_style"}, "the same LoRA"),
    ({"subject": "xl_subject"}, "no style LoRA is chosen"),
    ({"subject": "xl_subject", "style": "xl_style", "alhpa": 1}, "did you mean 'alpha'?"),
    ({"subject": "xl_subject", "style": "xl_style", "alpha": "high"}, "'alpha' (α) is a number from -100 to 100"),
    ({"subject": "xl_subject", "style": "xl_style", "selector": "klora"}, "did you mean 'K-LoRA'?"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_a_wrong_request_answers_4xx_with_the_sentence_and_no_picture(settings, sentence):
    status, answer = HOST.request(settings)
    assert status == 422
    assert sentence in answer["detail"]
    assert "images" not in answer


def test_positional_arguments_equal_the_dict():
    assert same(HOST.picture([True, HOST.subject, HOST.style, 0.8]), HOST.picture({**HOST.pair, "subject_weight": 0.8}))


@pytest.mark.parametrize("end", ["interrupt", "skip"])
def test_a_run_cut_short_leaves_nothing_behind(end):
    thread = threading.Thread(target=lambda: HOST.request(HOST.pair, steps=40))
    thread.start()
    time.sleep(3)
    HOST.call(f"/sdapi/v1/{end}", {})
    thread.join()


def test_a_lora_in_diffusers_keys_fuses_as_in_kohyas():
    names = {"lora_unet_" + module.native.replace(".", "_"): "unet." + module.diffusers[0] for module in sdxl_modules()}
    tensors = load_file(HOST.file(HOST.subject))
    rank = {key.split(".")[0]: value.shape[0] for key, value in tensors.items() if key.endswith("lora_down.weight")}
    diffusers, kohya = {}, {}
    for key, value in tensors.items():
        stem, _, leaf = key.partition(".")
        scale = float(tensors[stem + ".alpha"]) / rank[stem]
        if leaf == "lora_down.weight":
            kohya[key] = diffusers[names[stem] + ".lora_A.weight"] = value
        elif leaf == "lora_up.weight":
            kohya[key] = diffusers[names[stem] + ".lora_B.weight"] = (value.float() * scale).to(value.dtype)
    files = {HOST.file(HOST.subject).with_name(f"klora_test_{name}.safetensors"): data for name, data in (("diffusers", diffusers), ("kohya", kohya))}
    try:
        for path, data in files.items():
            save_file({key: value.clone() for key, value in data.items()}, path)
        HOST.call("/sdapi/v1/refresh-loras", {})
        pictures = [HOST.picture({"subject": path.stem, "style": HOST.style}) for path in files for _ in range(2)]
        assert all(same(pictures[0], other) for other in pictures[1:])
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        HOST.call("/sdapi/v1/refresh-loras", {})


def axis(label):
    scripts = HOST.call("/sdapi/v1/script-info")[1]
    plot = next(script for script in scripts if script["name"] == "x/y/z plot" and not script["is_img2img"])
    return plot["args"][0]["choices"].index(label)


def grid(x, x_values, y="Nothing", y_values=""):
    args = [axis(x), x_values if isinstance(x_values, str) else "", [] if isinstance(x_values, str) else x_values, axis(y), y_values, [], 0, "", [],
            True, True, True, False, False, False, False, 0, False]  # fmt: skip
    return {"script_name": "x/y/z plot", "script_args": args}


def test_xyz_over_selector_gives_the_pictures_of_the_selectors():
    selectors = ["K-LoRA", "Subject only", "Style only"]
    arrays, _ = HOST.pictures(HOST.pair, **grid("[K-LoRA] Selector", selectors, "Seed", "42,43"))
    singles = [HOST.picture({**HOST.pair, "selector": name}, seed=seed) for seed in (42, 43) for name in selectors]
    assert all(same(a, b) for a, b in zip(arrays[-6:], singles, strict=True))


def test_xyz_refuses_all_bad_values_before_the_first_picture():
    status, answer = HOST.request(HOST.pair, **grid("[K-LoRA] γ", "auto,high"))
    assert status >= 400
    assert "'gamma' (γ) is auto or off or a number" in answer["errors"]


def test_analyze_answers_the_plan_of_the_command_line():
    status, answer = HOST.call("/klora/v1/analyze", {**HOST.pair, "steps": 7, "schedule": "s*"})
    assert status == 200
    assert answer["selection"] == plan_of(7, schedule="s*").selection.tolist()
    status, answer = HOST.call("/klora/v1/analyze", {**HOST.pair, "steps": 0})
    assert status == 422
    assert "'steps' is a whole number" in answer["detail"]
    assert HOST.call("/klora/v1/analyze", {"subject": "../../config", "style": HOST.style})[0] == 422


def test_schema_and_list_are_in_the_hosts_openapi_page():
    assert {"/klora/v1/schema", "/klora/v1/loras", "/klora/v1/analyze"} <= set(HOST.call("/openapi.json")[1]["paths"])
    assert HOST.call("/klora/v1/schema")[1]["title"] == "K-LoRA"
    assert {HOST.subject, HOST.style} <= {lora["name"] for lora in HOST.call("/klora/v1/loras")[1]}
