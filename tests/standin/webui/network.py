"""A LoRA file of the registry, and one that is loaded."""

import hashlib
from pathlib import Path

from safetensors import safe_open


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name, self.filename = name, filename
        self.shorthash = ""
        with safe_open(filename, "pt") as file:
            self.metadata = file.metadata() or {}
        self.alias = self.metadata.get("ss_output_name", name)

    def read_hash(self):
        if not self.shorthash:
            self.shorthash = hashlib.sha256(Path(self.filename).read_bytes()).hexdigest()[:12]


class Network:
    def __init__(self, name, network_on_disk):
        self.name, self.network_on_disk = name, network_on_disk
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = self.mentioned_name = None
        self.modules = {}
        self.bundle_embeddings = {}
        self.mtime = Path(network_on_disk.filename).stat().st_mtime
