"""What trainers write into a LoRA's header: trigger words, the base model, what the file calls itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.analysis import analyze
from klora.lora_metadata import LONGEST_WORD, MOST_WORDS, trained_on, trigger_words
from klora.settings import Settings

PAIR = Path(__file__).parent / "data" / "golden" / "sdxl_attention_same_rank"

KOHYA = {
    "ss_dataset_dirs": json.dumps(
        {"10_sks dog": {"n_repeats": 10, "img_count": 10}, "1_img": {"n_repeats": 1, "img_count": 4}}
    ),
    "ss_tag_frequency": json.dumps(
        {"10_sks dog": {"sks dog": 10, "sitting": 9, "grass": 2}, "1_img": {"dog": 4, "night": 1}}
    ),
}
WORDS = [
    ({}, []),
    ({"modelspec.trigger_phrase": "ohwx,  in ink\twash"}, ["ohwx", "in ink wash"]),
    (KOHYA, ["sks dog", "dog", "sitting"]),
    ({"modelspec.trigger_phrase": "SKS DOG", **KOHYA}, ["SKS DOG", "dog", "sitting"]),
    (
        {
            "ss_datasets": json.dumps(
                [{"subsets": [{"class_tokens": "ohwx man", "image_dir": "x"}, {"class_tokens": None}]}]
            )
        },
        ["ohwx man"],
    ),
    ({"ss_tag_frequency": json.dumps({"1_trigger": {"trigger": 1}})}, ["trigger"]),
    ({"ss_tag_frequency": json.dumps({"1_a": {f"a whole caption of its own {i}": 1 for i in range(9)}})}, []),
    ({"instance_prompt": "a photo of TOK dog"}, ["a photo of TOK dog"]),
    ({"ss_tag_frequency": "{not JSON", "ss_dataset_dirs": "[1, 2]", "ss_datasets": '{"subsets": 3}'}, []),
    (
        {
            "ss_tag_frequency": json.dumps({"1_x": {"a": "many", "b": None}, "2_y": 7}),
            "ss_dataset_dirs": json.dumps({"1_x": 5}),
        },
        ["x"],
    ),
    ({"ss_tag_frequency": "[" * 100_000}, []),
]


@pytest.mark.parametrize(("metadata", "words"), WORDS)
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words


def test_words_are_few_short_and_printable():
    many = trigger_words({"trigger_words": ",".join(f"word{i}" for i in range(99))})
    assert many == [f"word{i}" for i in range(MOST_WORDS)]
    assert trigger_words({"trigger_word": "x" * (LONGEST_WORD + 1)}) == []
    assert trigger_words({"trigger_word": "a\x1b[2J\ud800"})[0].isprintable()


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, ""),
        (
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "D:\\models\\pony.safetensors"},
            "sdxl_base_v1-0, pony",
        ),
        ({"modelspec.architecture": "flux-1-dev/lora", "ss_sd_model_name": "None"}, "flux-1-dev"),
    ],
)
def test_what_it_was_trained_on(metadata, said):
    assert trained_on(metadata) == said


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [
        ({"ss_output_name": "sdxl_lightning_4step"}, True),
        ({"modelspec.title": "Hyper-SD 8 steps"}, True),
        ({"ss_network_args": '{"preset": "DMD2"}'}, True),
        ({"ss_sd_model_name": "dreamshaper_turbo.safetensors", "modelspec.title": "Ink"}, False),
    ],
)
def test_an_accelerator_is_told_by_what_its_file_says_whatever_its_name(metadata, warned, tmp_path):
    """Only what the file says of itself counts: a style trained on a turbo checkpoint is a style."""
    save_file(load_file(PAIR / "style.safetensors"), tmp_path / "style.safetensors", metadata=metadata)
    with torch.no_grad():
        found = analyze(PAIR / "subject.safetensors", tmp_path / "style.safetensors", Settings(), steps=2)
    assert any("looks like an accelerator" in warning for warning in found.warnings) == warned
