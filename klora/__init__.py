"""K-LoRA (CVPR 2025) for the Stable Diffusion WebUIs: this subject in that style, without training."""

__version__ = "0.1.0"
