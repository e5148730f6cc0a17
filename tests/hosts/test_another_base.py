"""LoRAs of another base model than the checkpoint's are refused by name, even where layers share names."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from klora.core.families import FAMILIES
from klora.core.lora_file import read_lora

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PAIRS = {
    "sdxl": "sdxl_attention_same_rank",
    "sd15": "sd15_kohya_peft",
    "flux": "flux_fused_split",
    "chroma": "chroma_kohya_diffusers",
    "klein4b": "klein_dotted_diffusers",
    "z_image": "z_image_fused_musubi",
    "lumina_2": "lumina_2_fused_split",
    "anima": "anima_with_text",
    "qwen": "qwen_native_kohya",
    "krea": "krea_grouped_keys",
    "wan": "wan_two_kinds",
    "ernie": "ernie_onetrainer_kohya",
}


@pytest.mark.parametrize("base", PAIRS)
def test_a_pair_of_another_base_is_refused_by_name(host, base):
    if base == host.base:
        pytest.skip("that is its own")
    files = {
        f"klora_test_{role}": load_file(GOLDEN / PAIRS[base] / f"{role}.safetensors")
        for role in ("subject", "style")
    }
    with host.more_loras(**files):
        status, answer = host.request({role: f"klora_test_{role}" for role in ("subject", "style")})
        assert status == 422
        theirs, loaded = FAMILIES[base].short_name, FAMILIES[host.base].short_name
        assert (
            f"are for {theirs} and the loaded checkpoint is {loaded}: load a checkpoint of"
            in answer["detail"]
        )
        status, answer = host.request({**host.pair, "style": "klora_test_style"})
        assert status == 422
        may_be_theirs = base in read_lora(host.file(host.subject)).families
        said = f"and the loaded checkpoint is {loaded}" if may_be_theirs else "choose two LoRAs of the same"
        assert f"for {theirs}" in answer["detail"]
        assert said in answer["detail"]
