"""Accelerators are recognised by whole words with steps or versions beside them; other names pass."""

import pytest

from klora.accelerators import ACCELERATORS, is_accelerator

REAL = """
Hyper-FLUX.1-dev-8steps-lora Hyper-SDXL-8steps-CFG-lora Hyper-SD15-1step-lora HyperSDXL8Steps Hyper-SD
hypersd_lora sdxl_lightning_8step_lora lcm-lora-sdxl LCM_LoRA_Weights lcmLoraXL FLUX.1-Turbo-Alpha
sd_xl_turbo_lora_v1 SDXL-Turbo FluxDevTurbo8Steps FLUX.1-dev_tdd_lora_weights TDD-adv_lora flash-sdxl
SDXL_Flash_LoRA pcm_sdxl_smallcfg_4step_converted dmd2_sdxl_4step_lora_fp16 flux_schnell_lora
Z-Image-Fun-Lora-Distill-8-Steps-2602 Z-Image-Fun-Lora-Distill-4-Steps Z-Image-Turbo-DistillPatch
zimage_turbo_training_adapter_v2 zimage_turbo_distill_lora z_image_lightning_4steps
flux1-dev-to-schnell-4step-lora schnell-lora-rank64 flux-schnell-lora-r128 TCD-SDXL-LoRA
chroma-flash-heun_r256-fp32 Hyper-Chroma-low-step-LoRA Hyper-Chroma-Turbo-Alpha-16steps-lora
Flux_2-Turbo-LoRA_comfyui flux2-klein-base-9b-turbo
lcm-lora-sdv1-5 LCM_LoRA_Weights_SD15 Hyper-SD15-8steps-CFG-lora pcm_sd15_smallcfg_2step_converted
TCD-SD15-LoRA AnimateLCM_sd15_t2v_lora perflow-sd15-lora sd15_turbo_lora flash-sd
Stable-Diffusion-v1-5-Turbo-LoRA
Qwen-Image-Lightning-4steps-V1.0-bf16 Qwen-Image-Edit-2509-Lightning-8steps-V1.0 Qwen-Image-Edit-Lightning
Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32 Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16
wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022 Wan21_CausVid_14B_T2V_lora_rank32_v2
Wan21_AccVid_T2V_14B_lora_rank32_fp16 Wan2.1_T2V_14B_FusionX_LoRA Wan14BT2VFusioniX_self_forcing
Wan_2_1_T2V_14B_rCM_lora FastWan_T2V_14B_480p_lora_rank_128 anima_turbo_lora
"""
"""Names of files that people download, or close to them."""

OTHERS = """
lightning_mcqueen Lightning_FFXIII black_lightning raiden_lightning porsche_911_turbo 911-turbo-flux
turbo_granny turbografx_xl the_flash Flash_Gordon_SDXL flash_photography flashlight hyperrealism
Hyper-Realistic_SDXL hyper_detailed_sdxl HyperDimensionNeptunia style_schnell schnellzug michael_schnell_v2
turbo lightning 8_steps_of_ink pcmcia sdxl_v1 chroma_v2 FLUX.2-klein-4B turbo_b hyper_chroma_low_poly
sd15_v2 stable_diffusion_style turbo_diffusion_art
Z-Image-Turbo z_image_turbo_lora_v1 zImageTurbo_rank16
zimage_turbo Z-Image-Turbo-Pixel-Art z-image-turbo-2000-steps spirits_distill_whisky turbo_image
image_turbo qwen_image_lightning_mcqueen wan_fusion_cuisine
krea_2_style_turbofan obi_wan ernie_and_bert anima_lightning_mage_style my_edit
Krea-2-Turbo krea2_turbo_lora_v1 ERNIE-Image-Turbo ernie_image_turbo_lora
"""


@pytest.mark.parametrize("name", REAL.split())
def test_a_real_accelerator_is_found(name):
    assert is_accelerator(f"{name}.safetensors")
    assert is_accelerator(name)


@pytest.mark.parametrize("name", OTHERS.split())
def test_characters_cars_and_styles_are_left_alone(name):
    assert not is_accelerator(f"{name}.safetensors")


def test_words_of_the_users_own_count_as_a_whole():
    assert is_accelerator("my_few_steps_XL", [*ACCELERATORS, "few steps"])
    assert is_accelerator("XL_STYLE.safetensors", ["nothing", "xl_style"])
    assert not is_accelerator("my_fewest_steps", ["few steps"])
    assert not is_accelerator("anything", ["", " "])
