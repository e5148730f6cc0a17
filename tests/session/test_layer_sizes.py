"""Each host tells its layers' true sizes, in any storage, and which narrower LoRAs it accepts."""

from types import SimpleNamespace

import pytest
import torch
from forge_family import ClassicPatcher, ComfyPatcher, ForgePatcher, Networks, checkpoint
from torch import nn

from klora.core.families.flux import flux_modules
from klora.core.families.sdxl import sdxl_modules
from klora.core.lora_file import LayerInfo
from klora.errors import HostError, PairError
from klora.hosts.a1111 import A1111
from klora.hosts.detect import find_adapter, name_of_base
from klora.hosts.sizes import LayerSize, check_fit, left_out, native_sizes, true_shape

WIDTH = 8


def file_of(**shapes):
    layers = {name.replace("__", "."): LayerInfo(4, shape) for name, shape in shapes.items()}
    return SimpleNamespace(path=SimpleNamespace(name="dog.safetensors"), layers=layers)


def packed(shape, **beside):
    """A weight of four bits: half as many bytes in one column, and the true shape beside it."""
    weight = nn.Parameter(torch.zeros(shape[0] * shape[1] // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.__dict__.update(beside)
    return weight


class GGUF(nn.Parameter):
    """Bytes that answer with the shape of what they hold, as the hosts' do."""

    @property
    def shape(self):
        return torch.Size([24, 8])


STORED = {
    "bitsandbytes": packed((24, 8), quant_state=SimpleNamespace(shape=torch.Size([24, 8]))),
    "bitsandbytes before it is packed": nn.Parameter(torch.zeros(24, 8)),
    "comfy_kitchen": packed((24, 8), _params=SimpleNamespace(orig_shape=(24, 8))),
    "GGUF": GGUF(torch.zeros(24, 4, dtype=torch.uint8), requires_grad=False),
    "not loaded yet": nn.Parameter(torch.empty(24, 8, device="meta")),
    "8 bits": nn.Parameter(torch.zeros(24, 8, dtype=torch.int8), requires_grad=False),
}


@pytest.mark.parametrize("storage", STORED)
def test_a_stored_weight_has_its_true_shape(storage):
    assert true_shape(STORED[storage]) == (24, 8)


def test_rows_of_fused_weights_are_layers_of_their_own():
    weights = {
        "double_blocks.0.img_attn.qkv": torch.empty(3 * WIDTH, WIDTH),
        "single_blocks.0.linear1": torch.empty(7 * WIDTH, WIDTH),
        "single_blocks.1.linear1": torch.empty(9 * WIDTH, WIDTH),
        "single_blocks.0.norm.query_norm": torch.empty(4),
        "img_in": torch.empty(WIDTH, 384),
    }
    sizes = {name: size.shape for name, size in native_sizes(flux_modules(), weights.get).items()}
    thirds = {
        f"{path}:{piece}": (WIDTH, WIDTH)
        for path in weights
        if "." in path and "norm" not in path
        for piece in "qkv"
    }
    assert sizes == {
        **thirds,
        "single_blocks.0.linear1:mlp": (4 * WIDTH, WIDTH),
        "single_blocks.1.linear1:mlp": (6 * WIDTH, WIDTH),
        "img_in": (WIDTH, 384),
    }


def test_a_convolution_is_the_matrix_of_its_taps():
    weights = {
        "input_blocks.0.0": torch.empty(32, 4, 3, 3),
        "input_blocks.4.0.skip_connection": torch.empty(64, 32, 1, 1),
    }
    sizes = native_sizes(sdxl_modules(), weights.get)
    assert {name: size.shape for name, size in sizes.items()} == {
        "input_blocks.0.0": (32, 36),
        "input_blocks.4.0.skip_connection": (64, 32),
    }


SIZES = {"a.q": LayerSize((8, 8)), "a.k": LayerSize((8, 8))}


def test_the_sentence_names_file_layer_and_both_sizes():
    with pytest.raises(PairError) as caught:
        check_fit([file_of(a__q=(8, 8), a__k=(16, 8), a__v=(1, 1))], SIZES)
    assert str(caught.value) == (
        "The LoRA dog.safetensors does not fit the loaded checkpoint: its layer a.k is 16 × 8 and there it "
        "is 8 × 8 (rows × columns; 1 of its 3 layers differ): load the checkpoint that it was made for, or "
        "choose a LoRA made for this one."
    )


def test_a_matrix_on_its_side_does_not_fit():
    with pytest.raises(PairError):
        check_fit([file_of(a__q=(4, 16))], SIZES)


def test_layers_that_are_not_there_are_said_and_no_fault():
    check_fit([file_of(a__q=(8, 8), b__q=(5, 5))], SIZES)
    files = {"subject": file_of(a__q=(8, 8)), "style": file_of(a__q=(8, 8), b__q=(5, 5))}
    [sentence] = left_out(files, SIZES)
    assert "has no layer b.q (1 of 2 layers of the style LoRA dog.safetensors" in sentence


def of_kind(shape, kind):
    return LayerInfo(4, shape, kind)


def a1111_model(**weights):
    modules = {path: SimpleNamespace(weight=weight) for path, weight in weights.items()}
    return SimpleNamespace(
        is_sdxl=True, model=SimpleNamespace(diffusion_model=SimpleNamespace(named_modules=modules.items))
    )


def test_a1111_fills_up_the_channels_of_an_inpainting_model():
    model = a1111_model(**{"input_blocks.0.0": torch.empty(32, 9, 3, 3), "out.2": torch.empty(4, 32, 3, 3)})
    sizes = A1111(None).sizes_of(model)
    assert sizes["input_blocks.0.0"].takes(of_kind((32, 36), "LoCon"))
    assert sizes["input_blocks.0.0"].takes(of_kind((32, 36), "full diff"))
    assert not sizes["input_blocks.0.0"].takes(of_kind((32, 36), "LoHa"))
    assert not sizes["input_blocks.0.0"].takes(of_kind((32, 45), "LoCon"))
    assert not sizes["out.2"].takes(of_kind((4, 36), "LoCon"))


@pytest.mark.parametrize(
    ("patcher", "kind", "weight", "columns", "taken"),
    [
        (ForgePatcher, "LoRA", (8, 384), 64, True),
        (ForgePatcher, "LoRA", (8, 64), 384, False),
        (ForgePatcher, "LoKr", (8, 384), 64, False),
        (ForgePatcher, "LoCon", (8, 9, 3, 3), 36, False),
        (ForgePatcher, "full diff", (8, 9, 3, 3), 36, True),
        (ClassicPatcher, "full diff", (8, 9, 3, 3), 36, True),
        (ClassicPatcher, "LoRA", (8, 384), 64, False),
        (ComfyPatcher, "full diff", (8, 9, 3, 3), 36, False),
        (ComfyPatcher, "LoRA", (8, 384), 64, False),
    ],
)
def test_which_narrower_loras_a_patcher_takes(patcher, kind, weight, columns, taken):
    model = forge_model(patcher, torch.empty(weight))
    sizes = find_adapter(Networks({}), model).sizes_of(model)
    assert (
        sizes["input_blocks.0.0" if model.is_sdxl else "img_in"].takes(of_kind((8, columns), kind)) == taken
    )


def forge_model(patcher, weight):
    """A checkpoint of whose denoiser this is the first layer: SDXL's convolution, or FLUX's matrix."""
    model = checkpoint(patcher)
    model.is_sdxl = weight.dim() == 4
    layer, whole = SimpleNamespace(weight=weight), model.forge_objects.unet.model
    del whole.diffusion_model
    whole.diffusion_model = (
        SimpleNamespace(input_blocks=SimpleNamespace(**{"0": SimpleNamespace(**{"0": layer})}))
        if model.is_sdxl
        else SimpleNamespace(img_in=layer, double_blocks=[0] * 19, single_blocks=[0] * 38, vector_in=None)
    )
    return model


@pytest.mark.parametrize("patcher", [ForgePatcher, ComfyPatcher, ClassicPatcher])
def test_a_weight_that_another_lora_has_widened_counts_as_the_checkpoints_own(patcher):
    model, original = forge_model(patcher, torch.empty(8, 128)), torch.empty(8, 64)
    unet = model.forge_objects.unet
    backup = unet.lora_loader.backup if patcher is ForgePatcher else unet.backup
    backup["diffusion_model.img_in.weight"] = (
        SimpleNamespace(weight=original) if patcher is ComfyPatcher else original
    )
    assert find_adapter(Networks({}), model).sizes_of(model)["img_in"].shape == (8, 64)


def test_nunchaku_is_refused_before_its_packed_weights_are_looked_at():
    model = checkpoint(ComfyPatcher)
    model.forge_objects.unet.model.diffusion_model.loras = []
    with pytest.raises(HostError, match="Nunchaku"):
        find_adapter(Networks({}), model).sizes_of(model)


@pytest.mark.parametrize(
    ("engine", "flags", "name"),
    [
        ("Chroma", {}, "Chroma"), ("Flux2", {}, "FLUX.2 Klein"), ("PiD", {}, "PiD"),
        ("LatentDiffusion", {"is_sd1": True}, "Stable Diffusion 1.x"),
        ("StableDiffusion", {"is_sd1": False, "is_sd2": True}, "Stable Diffusion 2.x"),
        ("OfNextYear", {}, None),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_base_is_called_what_people_call_it(engine, flags, name):
    assert name_of_base(type(engine, (), flags)()) == name
