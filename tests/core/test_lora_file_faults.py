"""Every file that cannot be used gives one sentence that names the file and any tensor at fault."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from klora.core.lora_file import read_lora
from klora.errors import LoraFileError

STEM = "lora_unet_middle_block_1_proj_in"
UP, DOWN = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight"
GOOD = {UP: torch.ones(8, 2), DOWN: torch.ones(2, 8)}
FLUX_STEM = "lora_unet_double_blocks_0_img_attn_qkv"


def sentence(path: Path) -> str:
    """What reading `path` and all its deltas says."""
    with pytest.raises(LoraFileError) as caught:
        lora = read_lora(path)
        with lora.open() as reader:
            for name in lora.layers:
                reader(name)
    text = str(caught.value)
    assert path.name in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


SD2_TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TENSOR_FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "up without down": ({UP: torch.ones(8, 2)}, f'"{UP}" has no partner "down"'),
    "down without up": ({DOWN: torch.ones(2, 8)}, f'"{DOWN}" has no partner "up"'),
    "half a LoHa": ({f"{STEM}.hada_w1_a": torch.ones(8, 2)}, "hada_w1_b"),
    "half a LoKr": ({f"{STEM}.lokr_w1": torch.ones(8, 2), f"{STEM}.lokr_w2_a": torch.ones(2, 2)}, "lokr_w2"),
    "ranks differ": ({UP: torch.ones(8, 3), DOWN: torch.ones(2, 8)}, f'"{UP}"'),
    "LoHa halves differ": (
        {
            f"{STEM}.hada_w{n}_{x}": torch.ones(s)
            for n, x, s in (("1", "a", (8, 2)), ("1", "b", (2, 8)), ("2", "a", (6, 2)), ("2", "b", (2, 8)))
        },
        "hada_w2_a",
    ),
    "a vector": ({UP: torch.ones(8), DOWN: torch.ones(2, 8)}, f'"{UP}"'),
    "rank 0": ({UP: torch.ones(8, 0), DOWN: torch.ones(0, 8)}, f'"{UP}"'),
    "fused rows that no cut fits": (
        {f"{FLUX_STEM}.lora_up.weight": torch.ones(8, 2), f"{FLUX_STEM}.lora_down.weight": torch.ones(2, 8)},
        "8 rows",
    ),
    "NaN": ({UP: torch.full((8, 2), float("nan")), DOWN: torch.ones(2, 8)}, f'"{UP}" of'),
    "infinite": (
        {UP: torch.ones(8, 2), DOWN: torch.tensor([[float("inf")] * 8, [-float("inf")] * 8])},
        f'"{DOWN}" of',
    ),
    "alpha NaN": (GOOD | {f"{STEM}.alpha": torch.tensor(float("nan"))}, f'"{STEM}.alpha"'),
    "alpha a vector": (GOOD | {f"{STEM}.alpha": torch.ones(3)}, f'"{STEM}.alpha"'),
    "integers": ({UP: torch.ones(8, 2, dtype=torch.int8), DOWN: torch.ones(2, 8)}, "int8"),
    "untrained": ({UP: torch.zeros(8, 2), DOWN: torch.ones(2, 8)}, "changes nothing"),
    "twice the same layer": (
        GOOD
        | {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 8),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": 2 * torch.ones(8, 2),
        },
        "two tensors for one place",
    ),
    "text encoder only": (
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
        },
        "text encoders only",
    ),
    "norms only": (
        {
            "lora_unet_middle_block_1_norm.w_norm": torch.ones(8),
            "lora_unet_middle_block_1_norm.b_norm": torch.ones(8),
        },
        "no weight differences",
    ),
    "no tensors": ({}, "no tensors"),
    "SD 2.x": (
        {
            f"{SD2_TO_K}.lora_up.weight": torch.ones(320, 2),
            f"{SD2_TO_K}.lora_down.weight": torch.ones(2, 1024),
        },
        "Stable Diffusion 2.x",
    ),
    "SD 3": (
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(2, 2)},
        "Stable Diffusion 3",
    ),
    "SD 3.5 by SimpleTuner": (
        {"lycoris_transformer_blocks_3_attn2_to_q.lokr_w1": torch.ones(2, 2)},
        "Stable Diffusion 3",
    ),
    "FLUX.2": (
        {"transformer.single_transformer_blocks.40.attn.to_out.lora_A.weight": torch.ones(2, 2)},
        "FLUX.2",
    ),
    "HunyuanVideo": (
        {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(2, 2)},
        "HunyuanVideo",
    ),
    "NewBie": ({"diffusion_model.layers.35.attention.qkv.lora_A.weight": torch.ones(2, 2)}, "NewBie"),
    "a checkpoint": (
        {
            "model.diffusion_model.out.2.weight": torch.ones(2, 2),
            "first_stage_model.quant_conv.weight": torch.ones(2),
        },
        "a whole checkpoint",
    ),
    "an embedding": ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8)}, "embedding"),
    "a VAE": ({"encoder.conv_in.weight": torch.ones(2, 2)}, "a VAE"),
    "OFT": ({"lora_unet_middle_block_1_proj_in.oft_blocks": torch.ones(2, 2)}, "OFT"),
    "something else": ({"hello": torch.ones(2)}, '"hello"'),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faults_in_the_tensors(tmp_path: Path, fault: str) -> None:
    tensors, names = TENSOR_FAULTS[fault]
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "odd.safetensors")
    assert names in sentence(tmp_path / "odd.safetensors")


BYTES = save({key: value.clone() for key, value in GOOD.items()})
HEADER = struct.unpack("<Q", BYTES[:8])[0]
FILE_FAULTS = {
    "empty": (b"", "is empty"),
    "cut in its tensors": (BYTES[:-5], "5 of its bytes are missing"),
    "cut in its header": (BYTES[: HEADER // 2], "inside its header"),
    "three bytes": (b"abc", "not a safetensors file"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors file"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "not a safetensors file"),
    "broken header": (struct.pack("<Q", 20) + b'{"a": [1, 2, 3]}    ' + bytes(8), "not a safetensors file"),
    "header not JSON": (struct.pack("<Q", 16) + b"{hello, hello!!}" + bytes(8), "not a safetensors file"),
    "header too large": (struct.pack("<Q", 1 << 40) + b"{" + bytes(100), "claims"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_in_the_file(tmp_path: Path, fault: str) -> None:
    content, names = FILE_FAULTS[fault]
    (tmp_path / "odd.safetensors").write_bytes(content)
    assert names in sentence(tmp_path / "odd.safetensors")


@settings(deadline=None, max_examples=200)
@given(place=st.integers(0, HEADER + 7), value=st.integers(0, 255))
def test_one_wrong_byte_in_the_header_never_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(BYTES[:place] + bytes([value]) + BYTES[place + 1 :])
    try:
        lora = read_lora(path)
        with lora.open() as reader:
            for name in lora.layers:
                reader(name)
    except LoraFileError as error:
        assert "flipped.safetensors" in str(error)


def test_missing_folder_and_unreadable(tmp_path: Path) -> None:
    assert "does not exist" in sentence(tmp_path / "none.safetensors")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in sentence(tmp_path / "folder")
    locked = tmp_path / "locked.safetensors"
    locked.write_bytes(BYTES)
    locked.chmod(0)
    if not os.access(locked, os.R_OK):
        assert "permissions" in sentence(locked)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("this-must-not-be-made",)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert "safetensors" in sentence(tmp_path / "evil.pt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Evil()))
    assert "safetensors" in sentence(tmp_path / "old.ckpt")
    assert not Path("this-must-not-be-made").exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [(b"", "is empty"), (b"hello" * 20, "odd.bin"), (b"PK\x03\x04" + bytes(60), "odd.bin")],
)
def test_broken_pickled_files(tmp_path: Path, content: bytes, names: str) -> None:
    (tmp_path / "odd.bin").write_bytes(content)
    assert names in sentence(tmp_path / "odd.bin")


def test_pickled_files_without_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no tensors by name" in sentence(tmp_path / "list.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:200])
    sentence(tmp_path / "cut.pt")


def test_a_file_that_changed_after_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "changed.safetensors"
    path.write_bytes(BYTES)
    lora = read_lora(path)
    save_file({"other": torch.ones(2)}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(path)
    with pytest.raises(LoraFileError, match=r"changed\.safetensors"), lora.open() as reader:
        reader("middle_block.1.proj_in")
    path.unlink()
    with pytest.raises(LoraFileError, match="no longer there"), lora.open():
        pass
