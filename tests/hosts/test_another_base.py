"""LoRAs of another base model than the loaded checkpoint's are refused with both names, also where layers of both have the same names."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from klora.analysis import BASE_NAMES

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PAIRS = {"sdxl": "sdxl_attention_same_rank", "sd15": "sd15_kohya_peft", "flux": "flux_fused_split"}


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
        said = f"are for {BASE_NAMES[base]} and the loaded checkpoint is {BASE_NAMES[host.base]}: load a checkpoint of"
        assert said in answer["detail"]
        status, answer = host.request({**host.pair, "style": "klora_test_style"})
        assert status == 422
        assert f"for {BASE_NAMES[base]}: choose two LoRAs of the same base model" in answer["detail"]
