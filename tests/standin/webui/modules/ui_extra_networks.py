"""The tabs of LoRAs and the like, of which the API needs none."""

extra_pages = []
