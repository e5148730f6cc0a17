"""Small stand-ins for what klora.webui needs of a host: gradio, its components, and the module `networks`."""

from types import ModuleType

from standin.webui.gradio import HTML, Block, Button, Component, Dropdown, Slider
from standin.webui.modules import infotext_utils as Infotext

__all__ = [
    "HTML",
    "Block",
    "Button",
    "Component",
    "Dropdown",
    "Infotext",
    "InputAccordion",
    "NetworkOnDisk",
    "Networks",
    "Slider",
    "module",
]


class NetworkOnDisk:
    def __init__(self, name, folder="/models/Lora", alias=None, digest="", hashed=True):
        self.name, self.filename, self.alias = name, f"{folder}/{name}.safetensors", alias or name
        self._digest = digest
        self.shorthash = digest if hashed else None
        self.reads = 0

    def read_hash(self):
        self.reads += 1
        self.shorthash = self._digest


class Networks(ModuleType):
    """The registry of the host's Lora extension."""

    def __init__(self):
        super().__init__("networks")
        self.available_networks, self.available_network_aliases, self.forbidden_network_aliases = {}, {}, {}
        self.on_disk = []

    @staticmethod
    def convert_diffusers_name_to_compvis(key, is_sd2):
        """Names of diffusers are not among those that the tests give this host."""
        return key

    def put(self, *entries):
        self.on_disk = list(entries)
        self.list_available_networks()
        return self

    def list_available_networks(self):
        self.available_networks.clear()
        self.available_network_aliases.clear()
        for entry in self.on_disk:
            self.available_networks[entry.name] = entry
            self.available_network_aliases.update({entry.name: entry, entry.alias: entry})


class InputAccordion(Component):
    def __init__(self, value, **settings):
        super().__init__(value, **settings)
        self.accordion = Block(settings["label"])


def module(name, **contents):
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made
