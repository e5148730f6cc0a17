"""The Lora extension: its registry, its loader, and what it does to a layer's weight.

The rules are those measured on the host: `loaded_networks` stays the same list; a layer remembers which
networks it has, is backed up before it first gets any, and is rewritten from the backup when the wanted ones
differ; a network that does not fit is counted, not raised.
"""

import time
from collections import defaultdict
from pathlib import Path

import network
import network_lora
from modules import errors, extra_networks, shared
from safetensors.torch import load_file

available_networks, available_network_aliases, forbidden_network_aliases = {}, {}, {}
loaded_networks = []
networks_in_memory = {}
SECONDS_A_FILE = 0.003
"""Reading people's full folders takes seconds, during which other threads see only a part of the list."""


class ExtraNetworkLora:
    def __init__(self):
        self.errors = {}

    def activate(self, p, params_list):
        additional = shared.opts.sd_lora
        self.errors.clear()
        if (
            additional != "None"
            and additional in available_networks
            and not any(params.items[0] == additional for params in params_list)
        ):
            weight = shared.opts.extra_networks_default_multiplier
            p.all_prompts = [f"{prompt}<lora:{additional}:{weight}>" for prompt in p.all_prompts]
            params_list.append(extra_networks.ExtraNetworkParams(items=[additional, weight]))
        weights = [[float(value) for value in params.positional[1:]] for params in params_list]
        text = [
            float(params.named.get("te", own[0] if own else 1))
            for params, own in zip(params_list, weights, strict=True)
        ]
        unet = [
            float(params.named.get("unet", own[1] if len(own) > 1 else te))
            for params, own, te in zip(params_list, weights, text, strict=True)
        ]
        load_networks([params.positional[0] for params in params_list], text, unet, [None] * len(unet))
        if not shared.opts.lora_add_hashes_to_infotext:
            return
        if not p.is_hr_pass or not hasattr(p, "lora_hashes"):
            p.lora_hashes = {}
        p.lora_hashes.update(
            {
                net.mentioned_name.replace(":", "").replace(",", ""): net.network_on_disk.shorthash
                for net in loaded_networks
                if net.mentioned_name
            }
        )
        if p.lora_hashes:
            p.extra_generation_params["Lora hashes"] = ", ".join(
                f"{name}: {value}" for name, value in p.lora_hashes.items()
            )

    def deactivate(self, p):
        if self.errors:
            p.comment(
                "Networks with errors: "
                + ", ".join(f"{name} ({count})" for name, count in self.errors.items())
            )
            self.errors.clear()


extra_network_lora = ExtraNetworkLora()
extra_networks.extra_network_registry["lora"] = extra_network_lora
extra_networks.extra_network_aliases["lyco"] = extra_network_lora


def list_available_networks():
    for known in (available_networks, available_network_aliases, forbidden_network_aliases):
        known.clear()
    forbidden_network_aliases.update({"none": 1, "Addams": 1})
    process_network_files()


def process_network_files(names=None):
    """Of two files with one alias the alias is nobody's; of two with one name the last one counts."""
    for path in sorted((shared.cmd_opts.folder / "models" / "Lora").rglob("*.safetensors")):
        if names and path.stem not in names:
            continue
        time.sleep(SECONDS_A_FILE)
        try:
            entry = network.NetworkOnDisk(path.stem, str(path))
        except OSError:
            errors.report(f"Failed to load network {path.stem} from {path}", exc_info=True)
            continue
        available_networks[entry.name] = entry
        if entry.alias in available_network_aliases:
            forbidden_network_aliases[entry.alias.lower()] = 1
        available_network_aliases.update({entry.name: entry, entry.alias: entry})


def of_tag(name):
    return (
        available_networks if name.lower() in forbidden_network_aliases else available_network_aliases
    ).get(name)


def layer_of(key):
    """The name of the model's layer that kohya's name of a module means; None if this model has none."""
    own = key.replace("lora_unet_", "diffusion_model_").replace(
        "lora_te2_text_model_encoder_layers_", "1_model_transformer_resblocks_"
    )
    if own.startswith("1_"):
        own = own.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
    own = own.replace("lora_te_text_model_encoder", "transformer_text_model_encoder")
    of_sdxl, of_sd1 = (own.replace("lora_te1_", start) for start in ("0_transformer_", "transformer_"))
    return next((name for name in (of_sdxl, of_sd1) if name in shared.sd_model.network_layer_mapping), None)


def convert_diffusers_name_to_compvis(key, is_sd2):
    """The stand-in's files have the names of the original network."""
    return key


def load_network(name, network_on_disk):
    net = network.Network(name, network_on_disk)
    found = defaultdict(dict)
    for key, value in load_file(network_on_disk.filename).items():
        stem, _, part = key.partition(".")
        if layer := layer_of(stem):
            found[layer][part] = value
    net.modules = {
        layer: network_lora.NetworkModuleLora(net, layer, weights) for layer, weights in found.items()
    }
    return net


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    already = {net.name: net for net in loaded_networks if net.name in names}
    loaded_networks.clear()
    if missing := [name for name in names if of_tag(name) is None]:
        process_network_files(missing)
    if any(of_tag(name) is None for name in names):
        list_available_networks()
    entries = [of_tag(name) for name in names]
    for i, (name, entry) in enumerate(zip(names, entries, strict=True)):
        net = already.get(name) or networks_in_memory.get(name)
        if entry and (net is None or Path(entry.filename).stat().st_mtime > net.mtime):
            try:
                net = networks_in_memory[name] = load_network(name, entry)
            except Exception as error:  # noqa: BLE001 as the host does
                errors.display(error, f"loading network {entry.filename}")
                continue
        if entry is not None:
            net.mentioned_name = name
            entry.read_hash()
        if net is None:
            continue
        net.te_multiplier, net.unet_multiplier, net.dyn_dim = (
            te_multipliers[i],
            unet_multipliers[i],
            dyn_dims[i],
        )
        loaded_networks.append(net)
    while len(networks_in_memory) > shared.opts.lora_in_memory_limit:
        networks_in_memory.pop(next(iter(networks_in_memory)))


def network_restore_weights_from_backup(self):
    backup = getattr(self, "network_weights_backup", None)
    if backup is not None:
        self.weight.data.copy_(backup)


def network_reset_cached_weight(self):
    self.network_current_names = ()
    self.network_weights_backup = None


def network_apply_weights(self):
    wanted = tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in loaded_networks)
    current = getattr(self, "network_current_names", ())
    if current == wanted:
        return
    if self.network_weights_backup is None:
        if current:
            raise RuntimeError(f"{self.network_layer_name} has networks but no backup")
        self.network_weights_backup = self.weight.data.clone()
    network_restore_weights_from_backup(self)
    for net in loaded_networks:
        if module := net.modules.get(self.network_layer_name):
            try:
                weight = self.weight.data if self.fp16_weight is None else self.fp16_weight
                updown, _ = module.calc_updown(weight)
                self.weight.data.copy_((weight.to(updown.dtype) + updown).to(self.weight.dtype))
            except RuntimeError:
                extra_network_lora.errors[net.name] = extra_network_lora.errors.get(net.name, 0) + 1
    self.network_current_names = wanted


def network_forward(org_module, x, original_forward):
    if not loaded_networks:
        return original_forward(org_module, x)
    network_restore_weights_from_backup(org_module)
    network_reset_cached_weight(org_module)
    y = original_forward(org_module, x)
    for net in loaded_networks:
        if module := net.modules.get(org_module.network_layer_name):
            y = module.forward(x, y)
    return y
