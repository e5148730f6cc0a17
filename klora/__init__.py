"""K-LoRA: training-free fusion of a subject LoRA and a style LoRA (CVPR 2025), for the Stable Diffusion WebUIs."""

__version__ = "0.1.0"
