"""What a run leaves alone, and what it keeps to while the world around it changes."""

import re
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import LISTS, SAME_MODULES, pixels, same, tag
from safetensors.torch import load_file, save_file

GO_ON = "go on without K-LoRA"


def warnings(answer):
    return answer["info"]["extra_generation_params"].get("K-LoRA warnings", "")


def hashes_in(infotext):
    """Of an infotext its "Lora hashes", {name: hash}."""
    found = re.search(r'Lora hashes: ("(?P<several>[^"]*)"|(?P<one>[^,\n]*))', infotext)
    text = (found["several"] or found["one"]) if found else ""
    return dict(entry.split(": ") for entry in text.split(", ") if entry)


@pytest.mark.parametrize(
    ("step", "call"), [("process", 1), ("warnings", 1), ("override", 1), ("override", 3)]
)
def test_an_error_while_a_run_is_set_up_leaves_the_image_to_the_host(host, step, call):
    """With the prompt's own LoRAs, one of the pair among them, and nothing in the infotext but why."""
    prompt = "a cat" + tag(host.other, 0.7) + tag(host.subject, 0.5)
    expected, infotext = host.images(prompt=prompt)
    with host.options(klora_on_error=GO_ON), host.fault(step, call, "RuntimeError"):
        arrays, told = host.images(host.pair, prompt=prompt)
    assert same(arrays[0], expected[0])
    assert f"a fault of the test in {step}" in told
    assert re.sub(r'K-LoRA stopped: "[^"]*", ', "", told) == infotext


def test_when_the_host_cannot_load_a_lora_the_prompts_own_tag_of_it_counts_again(host):
    prompt = "a cat" + tag(host.other, 0.7) + tag(host.style, 0.5)
    expected, infotext = host.images(prompt=prompt)
    host.image(prompt="a cat" + tag(host.style))
    with (
        host.options(klora_on_error=GO_ON),
        host.fault("networks loaded", 1, "RuntimeError"),
    ):
        arrays, told = host.images(host.pair, prompt=prompt, n_iter=2)
    assert same(arrays[-2], expected[0])
    assert hashes_in(told) == hashes_in(infotext)
    assert "K-LoRA stopped: " in told
    assert "K-LoRA subject" not in told


def errors_of(host):
    """The host's record of its last errors, the newest first."""
    return host.call("/internal/sysinfo")[1]["Exceptions"]


def test_an_error_that_nobody_foresaw_is_reported_with_its_traceback(host):
    with host.fault("process", 1, "RuntimeError"):
        status, answer = host.request(host.pair)
    assert status == 500
    assert "RuntimeError: a fault of the test in process" in answer["detail"]
    newest = errors_of(host)[0]
    assert newest["exception"] == "a fault of the test in process"
    assert any("preparation.py" in frame for frame, _ in newest["traceback"])


def test_an_error_of_the_users_is_no_more_than_its_sentence(host):
    before = errors_of(host)
    assert host.request({**host.pair, "subject": "no-such"})[0] == 422
    assert errors_of(host) == before


def test_runs_go_on_while_the_host_reads_its_lora_folders_again_and_again(host, fused):
    over = threading.Event()

    def refresh():
        while not over.is_set():
            host.call("/sdapi/v1/refresh-loras", {})

    client = threading.Thread(target=refresh)
    client.start()
    try:
        answers = [host.request(host.pair, prompt="a cat" + tag(host.subject, 0.3)) for _ in range(8)]
        listed = [{lora["name"] for lora in host.call("/klora/v1/loras")[1]} for _ in range(8)]
    finally:
        over.set()
        client.join()
    assert [status for status, _ in answers] == [200] * 8
    assert all(same(pixels(answer["images"][0]), fused) for _, answer in answers)
    assert all({host.subject, host.style, host.other} <= names for names in listed)


def test_with_the_hosts_option_off_no_hash_of_a_lora_is_written(host):
    with host.options(lora_add_hashes_to_infotext=False):
        _, infotext = host.images(host.pair, prompt="a cat" + tag(host.subject) + tag(host.other))
    assert f"K-LoRA subject: {host.subject}, K-LoRA style: {host.style}" in infotext
    assert "hash" not in infotext.replace("Model hash", "").replace("VAE hash", "")


@contextmanager
def more_names(host, make):
    """With another file that `make(source, target)` makes of the subject; yields its name."""
    source = host.file(host.subject)
    target = source.with_name("klora_test_another_name.safetensors")
    try:
        make(source, target)
        host.call("/sdapi/v1/refresh-loras", {})
        yield target.stem
    finally:
        target.unlink(missing_ok=True)
        host.call("/sdapi/v1/refresh-loras", {})


NAMES = {
    "symbolic link": lambda source, target: target.symlink_to(source),
    "hard link": lambda source, target: target.hardlink_to(source),
    "copy": lambda source, target: target.write_bytes(source.read_bytes()),
}


@pytest.mark.parametrize("kind", NAMES)
def test_one_file_under_two_names_is_refused_as_both(host, kind):
    try:
        with more_names(host, NAMES[kind]) as name:
            status, answer = host.request({"subject": host.subject, "style": name})
    except OSError:
        pytest.skip("this file system has no such links")
    assert status == 422
    assert "the same LoRA" in answer["detail"]
    assert f"{name}.safetensors" in answer["detail"]


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_a_tag_of_the_pairs_file_under_another_name_is_the_pairs(host, fused, kind):
    try:
        with more_names(host, NAMES[kind]) as name:
            answer = host.answer(host.pair, prompt="a cat" + tag(name, 0.3))
    except OSError:
        pytest.skip("this file system has no such links")
    assert same(pixels(answer["images"][0]), fused)
    assert "is applied once, by K-LoRA" in warnings(answer)


@contextmanager
def adding_to_every_prompt(host, name):
    """With the host's option "Add network to prompt".

    The host's cache of encoded prompts ignores that option, so other prompts clear it.
    """
    with host.options(sd_lora=name):
        host.image(prompt="a dog", negative_prompt="a bird")
        yield
        assert host.values_of(["sd_lora"]) == {"sd_lora": name}
    host.image(prompt="a dog", negative_prompt="a bird")


def test_a_lora_of_the_pair_that_an_option_adds_to_every_prompt_applies_once_and_that_is_said(host, fused):
    by_tag = host.image(prompt="a cat" + tag(host.subject))
    with adding_to_every_prompt(host, host.subject):
        answer = host.answer(host.pair, n_iter=2)
        infotext = answer["info"]["infotexts"][0]
        assert same(host.image(), by_tag)
    assert same(pixels(answer["images"][-2]), fused)
    assert "is applied once, by K-LoRA" in warnings(answer)
    assert infotext.startswith("a cat\n")
    assert not hashes_in(infotext)


def test_another_lora_that_an_option_adds_to_every_prompt_applies_beside_the_pair(host):
    expected = host.image(host.pair, prompt="a cat" + tag(host.other, 1.0))
    with adding_to_every_prompt(host, host.other):
        answer = host.answer(host.pair)
    assert same(pixels(answer["images"][0]), expected)
    assert not warnings(answer)


def test_told_to_go_on_the_option_adds_its_lora_again(host):
    expected = host.image(prompt="a cat" + tag(host.subject))
    with (
        adding_to_every_prompt(host, host.subject),
        host.options(klora_on_error=GO_ON),
        host.fault("process", 1, "RuntimeError"),
    ):
        assert same(host.image(host.pair), expected)


def test_an_option_that_cannot_be_set_for_one_run_is_refused_with_the_way_out(host):
    with adding_to_every_prompt(host, host.subject):
        status, answer = host.request(host.pair, override_settings_restore_afterwards=False)
    assert status == 422
    assert f'"Add network to prompt" adds {host.subject}' in answer["detail"]


@pytest.mark.parametrize("name", ["klora_test_a=b", "klora_test_a=b=c", "klora_test_a,b", "klora_test_(a)"])
def test_a_name_that_a_tag_could_not_carry_is_loaded(host, fused, name):
    with host.more_loras(**{name: load_file(host.file(host.subject))}):
        arrays, infotext = host.images({"subject": name, "style": host.style})
    assert same(arrays[0], fused)
    assert not hashes_in(infotext)


def test_a_file_called_none_is_chosen_by_its_file_name_as_lists_and_infotexts_say(host, fused):
    with host.more_loras(**{"None": load_file(host.file(host.subject))}):
        listed = {lora["name"] for lora in host.call("/klora/v1/loras")[1]}
        arrays, infotext = host.images({"subject": "None.safetensors", "style": host.style})
        status, answer = host.call("/sdapi/v1/txt2img", {"infotext": infotext, **LISTS})
    assert "None.safetensors" in listed
    assert "None" not in listed
    assert same(arrays[0], fused)
    assert status == 200
    assert same(pixels(answer["images"][0]), fused)


@contextmanager
def with_an_alias(host, alias):
    """With the subject under a name of its own and another name that its trainer wrote into it."""
    path = host.file(host.subject).with_name("klora_test_named_by_its_trainer.safetensors")
    try:
        save_file(load_file(host.file(host.subject)), path, {"ss_output_name": alias})
        host.call("/sdapi/v1/refresh-loras", {})
        yield path.stem
    finally:
        Path(path).unlink(missing_ok=True)
        host.call("/sdapi/v1/refresh-loras", {})


@pytest.mark.parametrize("form", ["<lora:{}>", "<lora:{}:0.3>"])
def test_what_a_tag_of_the_pair_names_keeps_its_hash_under_that_name(host, fused, form):
    with with_an_alias(host, "klora_test_alias") as name:
        for word in (name, "klora_test_alias"):
            prompt = "a cat" + form.format(word)
            expected = hashes_in(host.images(prompt=prompt)[1])
            arrays, infotext = host.images({"subject": name, "style": host.style}, prompt=prompt)
            assert list(expected) == [word]
            assert hashes_in(infotext) == expected
            assert same(arrays[0], fused)


HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "None", **SAME_MODULES}


def test_a_tag_of_the_hires_prompt_alone_keeps_its_hash_too(host):
    fields = {**HIRES, "hr_prompt": "a cat" + tag(host.subject)}
    expected = hashes_in(host.images(**fields)[1])
    for rule in ("continue", "off"):
        assert hashes_in(host.images({**host.pair, "hires": rule}, **fields)[1]) == expected
