"""LoRA files with other trainers' keys give the same images as the same LoRA with the host's own keys.

The host's own loader refuses most of them.
"""

import pytest
import torch
from host import replaced, same
from safetensors.torch import load_file

from klora.core import file_state
from klora.core.families import FAMILIES

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
MIDDLE = (".lora.down.weight", ".lora.up.weight")
OLD = (".down.weight", ".up.weight")


def flat(name):
    return name.replace(".", "_")


def processor(name):
    block, _, projection = name.rpartition(".to_")
    return f"{block}.processor.to_{projection.removesuffix('.0')}_lora"


def xlabs(name):
    block, _, part = name.rpartition("_attn.")
    return f"{block.rpartition('.')[0]}.processor.{part}_lora{1 if block.endswith('img') else 2}"


def anywhere(_name):
    return True


def in_attention(name):
    return ".to_" in name


def in_double_attention(name):
    return name.startswith("double_blocks") and name.endswith(("attn.qkv", "attn.proj"))


UNET = {
    "diffusers PEFT": (lambda module: f"unet.{module.diffusers[0]}", PEFT, anywhere),
    "diffusers middle": (lambda module: f"unet.{module.diffusers[0]}", MIDDLE, anywhere),
    "diffusers old processors": (lambda module: f"unet.{processor(module.diffusers[0])}", OLD, in_attention),
    "the paper's authors'": (lambda module: f"unet.unet.{module.diffusers[0]}", MIDDLE, in_attention),
    "raw PEFT": (lambda module: f"base_model.model.{module.diffusers[0]}", PEFT, anywhere),
    "dotted native": (lambda module: f"diffusion_model.{module.native}", PEFT, anywhere),
    "SimpleTuner": (lambda module: f"lycoris_{flat(module.diffusers[0])}", KOHYA, anywhere),
    "lora_unet__": (lambda module: f"lora_unet__{flat(module.native)}", KOHYA, anywhere),
    "a compiled model": (
        lambda module: f"base_model.model.base_model.model._orig_mod.{module.diffusers[0]}",
        PEFT,
        anywhere,
    ),
}
FLOW = {
    "dotted native": (lambda module: f"diffusion_model.{module.native}", PEFT, anywhere),
    "bare native": (lambda module: module.native, PEFT, anywhere),
    "raw PEFT": (lambda module: f"base_model.model.{module.native}", PEFT, anywhere),
    "lora_unet__": (lambda module: f"lora_unet__{flat(module.native)}", KOHYA, anywhere),
    "a compiled model": (lambda module: f"diffusion_model._orig_mod.{module.native}", PEFT, anywhere),
    "native names after transformer.": (lambda module: f"transformer.{module.native}", PEFT, anywhere),
}
FLUX = {**FLOW, "XLabs": (lambda module: xlabs(module.native), OLD, in_double_attention)}
UNFUSED = {
    **FLOW,
    "diffusers PEFT": (lambda module: f"transformer.{module.diffusers[0]}", PEFT, anywhere),
    "kohya with diffusers names": (
        lambda module: f"lora_unet_{flat(module.diffusers[0])}",
        KOHYA,
        anywhere,
    ),
}
SPLIT = {
    "bare": lambda name: (name, PEFT),
    "raw PEFT": lambda name: (f"base_model.model.transformer.{name}", PEFT),
    "OneTrainer": lambda name: (f"lora_transformer_{flat(name)}", KOHYA),
    "SimpleTuner": lambda name: (f"lycoris_{flat(name)}", KOHYA),
    "kohya with diffusers names": lambda name: (f"lora_unet_{flat(name)}", KOHYA),
}
"""Of fused matrices and of their pieces: {dialect: how it names a module}."""


def dialects_of(base):
    """{dialect: (how it names a module, its suffixes, which layers it can name)} for the base model."""
    others = FLOW if FAMILIES[base].fused else UNFUSED
    return {"sdxl": UNET, "sd15": UNET, "flux": FLUX}.get(base, others)


def factors(host):
    """(module, down, up) of every low-rank pair of the host's kohya subject, the scale in `up`."""
    tensors = load_file(host.file(host.subject))
    for module in FAMILIES[host.base].modules:
        stem = f"lora_unet_{flat(module.native)}"
        if stem + KOHYA[0] in tensors:
            down, up = (tensors[stem + suffix] for suffix in KOHYA)
            yield module, down, (up.float() * float(tensors[stem + ".alpha"]) / len(down)).to(up.dtype)


def assert_fuse_alike(host, **files):
    """Every file gives the same image beside the host's style, twice.

    The first of the two makes a copy of the file with other keys.
    """
    with host.more_loras(**files):
        images = [host.image({"subject": name, "style": host.style}) for name in files for _ in range(2)]
        assert all(same(images[0], other) for other in images[1:])
        assert not same(images[0], host.image({**host.pair, "method": "Style only"}))


@pytest.mark.parametrize("dialect", dict.fromkeys([*UNET, *FLUX, *UNFUSED]))
def test_other_keys_fuse_as_kohyas(host, dialect):
    dialects = dialects_of(host.base)
    if dialect not in dialects:
        pytest.skip("a dialect of the other base model")
    name_of, suffixes, includes = dialects[dialect]
    other, kohya = {}, {}
    for module, down, up in factors(host):
        if includes(module.native):
            kohya.update(
                {
                    f"lora_unet_{flat(module.native)}{suffix}": value
                    for suffix, value in zip(KOHYA, (down, up), strict=True)
                }
            )
            other.update(
                {name_of(module) + suffix: value for suffix, value in zip(suffixes, (down, up), strict=True)}
            )
    assert_fuse_alike(host, klora_test_kohya=kohya, klora_test_other=other)


def pieces(module, rows, width):
    """Heights of the matrices that diffusers makes of one: q is square, k and v are as high as each other."""
    if len(module.diffusers) < len(module.layers):
        return [rows]
    if module.native.endswith(".qkv"):
        return [width, (rows - width) // 2, (rows - width) // 2]
    return [width, width, width, rows - 3 * width] if module.native.endswith(".linear1") else [rows]


@pytest.mark.parametrize("dialect", SPLIT)
def test_other_split_keys_fuse_as_those_of_diffusers(host, dialect):
    if not FAMILIES[host.base].fused:
        pytest.skip("this base model fuses no matrices")
    other, diffusers = {}, {}
    for module, down, up in factors(host):
        if module.halves_swapped:
            continue
        heights = pieces(module, len(up), down.shape[1])
        for name, rows in zip(module.diffusers, torch.split(up, heights), strict=True):
            stem, suffixes = SPLIT[dialect](name)
            diffusers.update(
                {
                    f"transformer.{name}{suffix}": value
                    for suffix, value in zip(PEFT, (down, rows), strict=True)
                }
            )
            other.update({stem + suffix: value for suffix, value in zip(suffixes, (down, rows), strict=True)})
    assert_fuse_alike(host, klora_test_split=diffusers, klora_test_other=other)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_loaded_is_a_copy_of_the_file_that_is_there(host, in_place, monkeypatch):
    """Another file of the same name, size and time has a copy of its own."""
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)  # where the host is in this process
    name_of, suffixes, _ = dialects_of(host.base)["raw PEFT"]
    before, after = {}, {}
    for module, down, up in factors(host):
        for tensors, sign in ((before, 1), (after, -1)):
            tensors.update(
                {
                    name_of(module) + suffix: value
                    for suffix, value in zip(suffixes, (down, sign * up), strict=True)
                }
            )
    with host.more_loras(klora_test_before=before, klora_test_after=after):
        first, expected = (
            host.image({"subject": f"klora_test_{name}", "style": host.style}) for name in ("before", "after")
        )
        with replaced(host.file("klora_test_before"), after, 0, in_place):
            assert same(host.image({"subject": "klora_test_before", "style": host.style}), expected)
        assert same(host.image({"subject": "klora_test_before", "style": host.style}), first)
        assert not same(first, expected)
