"""One LoRA gives one plan, in whatever dialect it is saved."""

import dialects

from klora.core.lora_file import read_lora
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import score_pair

STEPS = 20


def plans(subject, style):
    scores = score_pair(subject, style)
    return [make_plan(scores, steps=STEPS, schedule=Schedule.named(name)).to_json([]) for name in ("s", "s*")]


def test_sdxl_dialects(tmp_path):
    dialect_names = list(dialects.SDXL_DIALECTS)
    style = read_lora(
        dialects.write_sdxl(tmp_path / "style.safetensors", "kohya", dialects.sdxl_factors(seed=1))
    )
    files = [
        read_lora(dialects.write_sdxl(tmp_path / f"{i}.safetensors", name, dialects.sdxl_factors()))
        for i, name in enumerate(dialect_names)
    ]
    expected = plans(files[0], style)
    assert all(plans(lora, style) == expected for lora in files[1:])
    switches = [layer["switches"] for layer in expected[0]["layers"]]
    assert any(switches), "the pair should have something to choose"


def test_flux_dialects_fused_and_split(tmp_path):
    modules = [*dialects.FLUX_BLOCKS, *dialects.FLUX_ENDS]
    factors = dialects.flux_factors(modules)
    style = read_lora(
        dialects.write_flux_split(
            tmp_path / "style.safetensors", "diffusers PEFT", modules, dialects.flux_factors(modules, seed=1)
        )
    )
    fused = [
        dialects.write_flux_fused(tmp_path / f"f{i}.safetensors", name, modules, factors)
        for i, name in enumerate(dialects.FLUX_FUSED_DIALECTS)
    ]
    split = [
        dialects.write_flux_split(tmp_path / f"s{i}.safetensors", name, modules, factors)
        for i, name in enumerate(dialects.FLUX_SPLIT_DIALECTS)
    ]
    found = [plans(read_lora(path), style) for path in [*fused, *split]]
    assert all(plan == found[0] for plan in found[1:])
