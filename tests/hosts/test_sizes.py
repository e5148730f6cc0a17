"""A LoRA of other sizes than the checkpoint is refused before scoring, unless the host itself pads it."""

import pytest
import torch
from host import same
from safetensors import safe_open
from safetensors.torch import load_file

from klora.core.families import FAMILIES
from klora.core.lora_file import read_lora

UP, DOWN = ("lora_up", "lora_B"), ("lora_down", "lora_A")


def twice(tensors, names, dim=0):
    """With every `up` twice as high, or every `down` twice as wide."""
    return {
        key: torch.cat([value, value], dim) if any(name in key for name in names) else value
        for key, value in tensors.items()
    }


def refusal(host, **chosen):
    status, answer = host.request({**host.pair, **chosen})
    assert status == 422, answer
    return answer["detail"]


@pytest.mark.parametrize("role", ["subject", "style"])
def test_a_lora_of_other_sizes_is_refused_with_file_layer_and_both_sizes(host, role):
    name = getattr(host, role)
    layer, info = next(iter(read_lora(host.file(name)).layers.items()))
    with host.more_loras(klora_test_wide=twice(load_file(host.file(name)), DOWN, 1)):
        sentence = refusal(host, **{role: "klora_test_wide"})
    rows, columns = info.shape
    assert "The LoRA klora_test_wide.safetensors does not fit the loaded checkpoint" in sentence
    assert (
        f"its layer {layer} is {rows} × {2 * columns} and there it is {rows} × {columns} (rows × columns;"
        in sentence
    )
    assert "choose a LoRA made for this one" in sentence


def test_one_layer_of_another_size_is_enough(host):
    tensors = load_file(host.file(host.style))
    key = next(
        key
        for key in tensors
        if any(name in key for name in UP) and not any(part in key for part in ("lora_te", "qkv", "linear1"))
    )
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    with host.more_loras(klora_test_high=tensors):
        assert "; 1 of its " in refusal(host, style="klora_test_high")


def test_nothing_is_scored_before(host):
    """A number that is none is found by the scoring."""
    tensors = twice(load_file(host.file(host.style)), UP)
    next(value for key, value in tensors.items() if any(name in key for name in DOWN)).view(-1)[0] = torch.nan
    with host.more_loras(klora_test_nan=tensors):
        assert "does not fit the loaded checkpoint" in refusal(host, style="klora_test_nan")


def test_a_1x1_convolution_is_the_linear_layer_of_its_channels(host):
    """Files made from SD 1.x's layout write factors of linear layers so."""
    linear = load_file(host.file(host.style))
    factors = [
        key for key in linear if "unet" in key and key.endswith(("lora_down.weight", "lora_up.weight"))
    ]
    if not factors:
        pytest.skip("only kohya's files for SDXL and SD 1.5 are written so")
    convolution = {
        key: value[..., None, None] if key in factors and value.dim() == 2 else value
        for key, value in linear.items()
    }
    with host.more_loras(klora_test_convolution=convolution):
        images = [host.image({**host.pair, "style": name}) for name in (host.style, "klora_test_convolution")]
    assert same(*images)


def missing_layer(host):
    """A linear layer of the base model, and of no other, that the host's checkpoint lacks."""
    others = [family for family in FAMILIES.values() if family.key != host.base]
    shared = {module.native for family in others for module in family.modules}
    modules = [module for module in FAMILIES[host.base].modules if module.native not in shared]
    with safe_open(host.folder / "models" / "Stable-diffusion" / host.checkpoint, "pt") as file:
        known = [key.removesuffix(".weight") for key in file.keys()]  # noqa: SIM118
    return next(
        (
            module.native
            for module in modules
            if module.kind == "linear" and not any(key.endswith(module.native) for key in known)
        ),
        None,
    )


def test_layers_that_the_checkpoint_lacks_are_left_out_and_that_is_said(host):
    layer = missing_layer(host)
    if layer is None:
        pytest.skip("this checkpoint has all layers")
    stem = f"lora_unet_{layer.replace('.', '_')}"
    more = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    with host.more_loras(klora_test_more={**load_file(host.file(host.style)), **more}):
        answer = host.answer({**host.pair, "style": "klora_test_more"})
    said = answer["info"]["extra_generation_params"]["K-LoRA warnings"]
    assert f"The loaded checkpoint has no layer {layer} (1 of " in said
    assert "layers of the style LoRA klora_test_more.safetensors are not there)" in said


def test_a_lora_of_none_of_the_checkpoints_layers_is_refused(host):
    layer = missing_layer(host)
    if layer is None:
        pytest.skip("this checkpoint has all layers")
    stem = f"lora_unet_{layer.replace('.', '_')}"
    only = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    with host.more_loras(klora_test_elsewhere=only):
        assert f"none of the layers of the loaded checkpoint, which has no {layer}" in refusal(
            host, style="klora_test_elsewhere"
        )
