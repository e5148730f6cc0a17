"""<name:items> of a prompt."""

import re
from collections import defaultdict

from modules.errors import reported

TAG = re.compile(r"<(\w+):([^>]+)>")
extra_network_registry = {}
extra_network_aliases = {}


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []
        split = [(item, item.split("=", 2) if isinstance(item, str) else [item]) for item in self.items]
        self.positional = [item for item, parts in split if len(parts) != 2]
        self.named = dict(parts for _, parts in split if len(parts) == 2)

    def __eq__(self, other):
        return self.items == other.items


def parse_prompts(prompts):
    """The prompts without their tags, and the tags of the first one."""
    data = defaultdict(list)
    for name, items in TAG.findall(prompts[0]) if prompts else ():
        data[name].append(ExtraNetworkParams(items.split(":")))
    return [TAG.sub("", prompt) for prompt in prompts], data


def activate(p, data):
    wanted = {name: [] for name in extra_network_registry}
    for word, params in list(data.items()):
        network = extra_network_registry.get(word) or extra_network_aliases.get(word)
        for name in (name for name, known in extra_network_registry.items() if known is network):
            wanted[name] += params
    for name, network in extra_network_registry.items():
        with reported(f"activating {name}"):
            network.activate(p, wanted[name])
    p.scripts.after_extra_networks_activate(
        p, batch_number=p.iteration, prompts=p.prompts, seeds=p.seeds, extra_network_data=data
    )


def deactivate(p, _data):
    for name, network in extra_network_registry.items():
        with reported(f"deactivating {name}"):
            network.deactivate(p)
