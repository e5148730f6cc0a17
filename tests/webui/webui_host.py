"""Small stand-ins for the parts of a host that klora.webui meets: gradio, its components, and the Lora extension's `networks`."""

import json
import re
from types import ModuleType, SimpleNamespace


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
        self.available_networks = {}
        self.on_disk = []

    def put(self, *entries):
        self.on_disk = list(entries)
        self.list_available_networks()
        return self

    def list_available_networks(self):
        self.available_networks.clear()
        self.available_networks.update({entry.name: entry for entry in self.on_disk})


class Component:
    def __init__(self, value=None, **settings):
        self.value, self.settings, self.clicked = value, settings, None
        self.__dict__.update(settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def click(self, fn, inputs, outputs, **_):
        self.clicked = SimpleNamespace(fn=fn, inputs=inputs, outputs=outputs)


class Dropdown(Component):
    pass


class Slider(Component):
    pass


class Block(Component):
    def __init__(self, label=None, **settings):
        super().__init__(None, label=label, **settings)


class InputAccordion(Component):
    def __init__(self, value, **settings):
        super().__init__(value, **settings)
        self.accordion = Block(settings["label"])


def module(name, **contents):
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


class Infotext:
    """How the host writes and reads the last line of a picture's parameters."""

    @staticmethod
    def write(params):
        def shown(value):
            return json.dumps(value, ensure_ascii=False) if set(str(value)) & set(",:\n") else str(value)

        return ", ".join(f"{name}: {shown(value)}" for name, value in params.items())

    @staticmethod
    def read(line):
        found, rest = {}, line
        while rest:
            name, _, rest = rest.lstrip().partition(":")
            rest = rest.lstrip()
            if match := re.match(r'("(?:\\.|[^"\\])+")(?:,|$)', rest):
                text, rest = json.loads(match[1]), rest[match.end():]
            else:
                text, _, rest = rest.partition(",")
            size = re.match(r"^(\d+)x(\d+)$", text)
            found.update({f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: text})
        return found
