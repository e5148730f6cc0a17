"""One path, two contents of the same size and time stamp: the scores are those of the content that is there.

Archives with normalised times, object stores and the Nix store give files such stamps. The two subject files
have the same tensors, but alpha 4 or 8 in the header, where PEFT writes it.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from klora.core import file_state
from klora.core.lora_file import read_lora
from klora.core.score_cache import ScoreCache
from klora.core.scores import score_pair

LAYERS = {
    f"{native}.transformer_blocks.0.attn1.{leaf}": f"{diffusers}.transformer_blocks.0.attn1.{leaf}"
    for native, diffusers in (
        ("middle_block.1", "mid_block.attentions.0"),
        ("output_blocks.0.1", "up_blocks.0.attentions.0"),
    )
    for leaf in ("to_q", "to_k", "to_v")
}
RANK = 4
PATTERN = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NAMES = {4: "before", 8: "after"}


def factors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(32, RANK, generator=generator), torch.randn(RANK, 32, generator=generator))
        for name in LAYERS
    }


def write(path, seed, alpha):
    tensors = {}
    for name, (up, down) in factors(seed).items():
        tensors |= {f"unet.{LAYERS[name]}.lora_B.weight": up, f"unet.{LAYERS[name]}.lora_A.weight": down}
    header = {"unet.r": RANK, "unet.lora_alpha": alpha, "unet.alpha_pattern": {PATTERN: 2}}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    os.utime(path, (1.7e9, 1.7e9))
    return path


def abs_sum(seed, alpha):
    return sum(
        float((up.double() @ down.double()).abs().sum() * (2 if LAYERS[name] == PATTERN else alpha) / RANK)
        for name, (up, down) in factors(seed).items()
    )


@pytest.fixture
def subjects(tmp_path):
    files = {alpha: write(tmp_path / name, 1, alpha) for alpha, name in NAMES.items()}
    assert len({(path.stat().st_size, path.stat().st_mtime_ns) for path in files.values()}) == 1
    return files


def overwritten(new, path):
    """`cp -p`: the same inode."""
    path.write_bytes(new.read_bytes())
    shutil.copystat(new, path)


def replaced(new, path):
    """`mv`: another inode."""
    shutil.copy2(new, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("put", [overwritten, replaced])
@pytest.mark.parametrize("at_rest", [True, False], ids=["at rest", "just written"])
def test_scores_are_of_the_file_that_is_there(tmp_path, subjects, put, at_rest, monkeypatch):
    if at_rest:
        monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)
    subject, style = tmp_path / "subject.safetensors", read_lora(write(tmp_path / "style.safetensors", 2, 4))
    for alpha in (4, 8, 4):
        put(subjects[alpha], subject)
        for _ in range(2):
            scores = score_pair(read_lora(subject), style, cache=ScoreCache(tmp_path / "cache"))
            assert scores.gamma == pytest.approx(abs_sum(1, alpha) / abs_sum(2, 4), rel=1e-6)


@pytest.mark.parametrize("put", [overwritten, replaced])
def test_what_was_read_of_the_file_before_is_not_kept_as_of_the_one_that_is_there(tmp_path, subjects, put):
    """A pair may wait minutes for its turn to be scored."""
    subject, style = tmp_path / "subject.safetensors", read_lora(write(tmp_path / "style.safetensors", 2, 4))
    cache = ScoreCache(tmp_path / "cache")
    put(subjects[4], subject)
    waiting = read_lora(subject)
    put(subjects[8], subject)
    score_pair(waiting, style, cache=cache)
    assert cache.load(cache.content(subject)) is None
    scores = score_pair(read_lora(subject), style, cache=cache)
    assert scores.gamma == pytest.approx(abs_sum(1, 8) / abs_sum(2, 4), rel=1e-6)
