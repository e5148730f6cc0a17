"""The miniature: a small drawn world, a model of SDXL's architecture trained on it, and LoRAs of it. README.md says how."""
