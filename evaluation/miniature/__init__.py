"""The miniature: a small drawn world, a model of SDXL's architecture trained on it, and LoRAs for it.

README.md says how it was made.
"""
