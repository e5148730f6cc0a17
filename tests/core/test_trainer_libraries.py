"""Files written by PEFT, diffusers and LyCORIS on small modules with real names, against what these add."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from klora.core.deltas import dense
from klora.core.lora_file import LoraFile, read_lora
from klora.core.lora_reader import LoraReader

SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (
        nn.Linear(16, 16),
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    ),
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": (
        nn.Linear(64, 16),
        "middle_block.1.transformer_blocks.9.ff.net.2",
    ),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k": (
        nn.Linear(24, 16),
        "output_blocks.5.1.transformer_blocks.0.attn2.to_k",
    ),
    "down_blocks.2.resnets.0.conv1": (nn.Conv2d(8, 16, 3, padding=1), "input_blocks.7.0.in_layers.2"),
    "down_blocks.2.resnets.0.conv_shortcut": (nn.Conv2d(8, 16, 1), "input_blocks.7.0.skip_connection"),
}
FLUX = {
    "transformer_blocks.0.attn.to_q": (nn.Linear(16, 16), "double_blocks.0.img_attn.qkv:q"),
    "transformer_blocks.18.attn.add_v_proj": (nn.Linear(16, 16), "double_blocks.18.txt_attn.qkv:v"),
    "transformer_blocks.3.ff_context.net.0.proj": (nn.Linear(16, 64), "double_blocks.3.txt_mlp.0"),
    "single_transformer_blocks.37.proj_mlp": (nn.Linear(16, 64), "single_blocks.37.linear1:mlp"),
    "single_transformer_blocks.0.proj_out": (nn.Linear(80, 16), "single_blocks.0.linear2"),
}
Network = dict[str, tuple[nn.Module, str]]


def network(modules: Network) -> nn.Module:
    """Fresh modules under their dotted names."""
    torch.manual_seed(3)
    root = nn.Module()
    for name, (module, _) in modules.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        shape = {
            key: getattr(module, key)
            for key in ("in_channels", "out_channels", "kernel_size", "padding")
            if hasattr(module, key)
        }
        place.add_module(
            last, nn.Conv2d(**shape) if shape else nn.Linear(module.in_features, module.out_features)
        )
    return root


def shake(parameters: list[nn.Parameter]) -> None:
    """Random values in place of what training starts from."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.3


def assert_deltas(lora: LoraFile, expected: dict[str, Tensor]) -> None:
    assert sorted(expected) == list(lora.layers)
    assert lora.unknown_keys == ()
    with lora.open() as delta_of:
        for name, delta in expected.items():
            torch.testing.assert_close(
                dense(delta_of(name)), delta.detach().float().flatten(1), rtol=1e-5, atol=1e-6
            )
            assert lora.layers[name].shape == tuple(delta.flatten(1).shape)


def with_magnitude(reader: LoraReader, name: str, weight: Tensor) -> Tensor:
    """DoRA's merged weight from what the reader gives."""
    magnitude = reader.magnitude(name)
    assert magnitude is not None
    directed = weight.detach() + dense(reader(name)).reshape(weight.shape)
    others = [axis for axis in range(weight.dim()) if axis != magnitude.axis]
    shape = [-1 if axis == magnitude.axis else 1 for axis in range(weight.dim())]
    return (
        magnitude.values.reshape(shape)
        * directed
        / torch.linalg.vector_norm(directed, dim=others, keepdim=True)
    )


def weight_in_use(module: nn.Module) -> Tensor:
    """The weight that `module` really applies, additions included, found from its outputs for unit inputs."""
    if isinstance(module, nn.Linear):
        inputs = torch.eye(module.in_features)
        return (module(inputs) - module(torch.zeros_like(inputs))).detach().T
    size = module.kernel_size[0]
    inputs = torch.zeros(module.in_channels, module.in_channels, size, size)
    inputs[:, :, size // 2, size // 2] = torch.eye(module.in_channels)
    return (module(inputs) - module(torch.zeros_like(inputs))).detach().flip(-1, -2).transpose(0, 1)


def peft_model(modules: Network, config: object) -> nn.Module:
    model = peft.get_peft_model(network(modules), config)
    shake(list(model.parameters()))
    return model


PEFT_CONFIGS = {
    "LoRA": lambda names: peft.LoraConfig(r=4, lora_alpha=4, target_modules=names),
    "LoHa": lambda names: peft.LoHaConfig(r=4, alpha=4, target_modules=names),
    "LoHa with cores": lambda names: peft.LoHaConfig(
        r=4, alpha=4, target_modules=names, use_effective_conv2d=True
    ),
    "LoKr": lambda names: peft.LoKrConfig(r=2, alpha=2, target_modules=names),
    "LoKr decomposed": lambda names: peft.LoKrConfig(
        r=1, alpha=1, target_modules=names, decompose_both=True, use_effective_conv2d=True
    ),
}


@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_file_saved_by_peft(tmp_path: Path, kind: str, modules: Network) -> None:
    model = peft_model(modules, PEFT_CONFIGS[kind](list(modules)))
    model.save_pretrained(tmp_path)
    tuned = dict(model.base_model.model.named_modules())
    expected = {
        canonical: tuned[name].get_delta_weight("default") for name, (_, canonical) in modules.items()
    }
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert lora.dialect == "raw PEFT"
    assert_deltas(lora, expected)


@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_dora_saved_by_peft(tmp_path: Path, modules: Network) -> None:
    model = peft_model(
        modules, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(modules), use_dora=True)
    )
    model.save_pretrained(tmp_path)
    tuned = dict(model.base_model.model.named_modules())
    weights = {canonical: tuned[name].base_layer.weight.clone() for name, (_, canonical) in modules.items()}
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    assert_deltas(
        lora, {canonical: tuned[name].get_delta_weight("default") for name, (_, canonical) in modules.items()}
    )
    assert lora.kinds == {"DoRA": len(modules)}
    model.merge_adapter()
    with lora.open() as reader:
        for name, (_, canonical) in modules.items():
            merged = with_magnitude(reader, canonical, weights[canonical])
            torch.testing.assert_close(merged, tuned[name].base_layer.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("base", ["sdxl", "flux"])
def test_a_file_saved_by_diffusers_with_its_settings(
    tmp_path: Path, base: str, rank_stabilised: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")
    modules, component = (SDXL, "unet") if base == "sdxl" else (FLUX, "transformer")
    first, second = list(modules)[:2]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(modules),
        use_rslora=rank_stabilised,
        rank_pattern={first: 2},
        alpha_pattern={second: 3},
    )
    model = peft_model(modules, config)
    tensors = peft.get_peft_model_state_dict(model)
    settings = training_utils._collate_lora_metadata({component: model.base_model.model})
    pipeline = diffusers.StableDiffusionXLPipeline if base == "sdxl" else diffusers.FluxPipeline
    if not settings:
        settings = {f"{component}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(
        tmp_path,
        **{
            f"{component}_lora_layers": {
                key.removeprefix("base_model.model."): value for key, value in tensors.items()
            }
        },
        **settings,
    )
    tuned = dict(model.base_model.model.named_modules())
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.dialect == "diffusers PEFT"
    assert lora.scale_from_metadata
    assert_deltas(
        lora, {canonical: tuned[name].get_delta_weight("default") for name, (_, canonical) in modules.items()}
    )


LYCORIS = {
    "LoRA and LoCon": {"algo": "locon"},
    "LoCon with mid": {"algo": "locon", "use_tucker": True},
    "rank-stabilised": {"algo": "locon", "rs_lora": True},
    "LoHa": {"algo": "loha"},
    "LoHa with cores": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr decomposed": {
        "algo": "lokr",
        "linear_dim": 1,
        "conv_dim": 1,
        "decompose_both": True,
        "factor": 8,
        "use_tucker": True,
    },
    "LoKr full": {"algo": "lokr", "full_matrix": True},
    "full": {"algo": "full"},
}


def lycoris_file(
    path: Path, modules: Network, settings: dict[str, object]
) -> tuple[LoraFile, dict[str, tuple[Tensor, Tensor]]]:
    """A LoRA of random values saved by LyCORIS, and {layer: (original weight, weight in use)}.

    The weights in use come from the modules' forward, as LyCORIS 4.1's get_diff_weight scales LoHa and LoKr
    twice.
    """
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": ["Linear", "Conv2d"], "target_name": list(modules)}
    )
    model = network(modules)
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in modules}
    net = lycoris.create_lycoris(
        model, 1.0, **{"linear_dim": 4, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 1, **settings}
    )
    net.apply_to()
    shake(list(net.parameters()))
    net.save_weights(str(path), torch.float32, {})
    weights = {
        layer: (originals[name], weight_in_use(model.get_submodule(name)))
        for name, (_, layer) in modules.items()
    }
    return read_lora(path), weights


@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_saved_by_lycoris(tmp_path: Path, kind: str, modules: Network) -> None:
    lora, weights = lycoris_file(tmp_path / "a.safetensors", modules, LYCORIS[kind])
    assert lora.dialect == "SimpleTuner LyCORIS"
    assert_deltas(lora, {layer: used - original for layer, (original, used) in weights.items()})


@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("on_output", [False, True], ids=["by column", "by row"])
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_dora_saved_by_lycoris(tmp_path: Path, algo: str, on_output: bool, modules: Network) -> None:
    settings = {"algo": algo, "dora_wd": True, "wd_on_out": on_output}
    lora, weights = lycoris_file(tmp_path / "a.safetensors", modules, settings)
    assert lora.kinds == {"DoRA": len(modules)}
    with lora.open() as reader:
        for layer, (original, used) in weights.items():
            torch.testing.assert_close(with_magnitude(reader, layer, original), used, rtol=1e-4, atol=1e-5)


def test_glora_saved_by_lycoris(tmp_path: Path) -> None:
    modules = {name: entry for name, entry in SDXL.items() if isinstance(entry[0], nn.Linear)}
    lora, weights = lycoris_file(tmp_path / "a.safetensors", modules, {"algo": "glora"})
    with lora.open() as reader:
        for layer, (original, used) in weights.items():
            factor = reader.input_factor(layer)
            assert factor is not None
            torch.testing.assert_close(
                dense(reader(layer)) + original @ dense(factor), used - original, rtol=1e-4, atol=1e-5
            )
