"""The A1111 adapter on a stand-in for the host's `networks`, whose layers remember their networks.

tests/hosts tests whole images, against a stand-in and against running hosts.
"""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from klora.core import file_state
from klora.core.families.base import NATIVE
from klora.core.lora_file import read_lora
from klora.errors import HostError
from klora.hosts.a1111 import A1111Switch, host_reads
from klora.hosts.base import Pair, PairLora

LAYERS = ["input_blocks.4.1.proj_in", "input_blocks.4.1.proj_out", "middle_block.1.proj_in"]
FILES = Path(__file__).parents[1] / "data" / "golden" / "sdxl_attention_same_rank"
NAMES = ["diffusion_model_" + layer.replace(".", "_") for layer in LAYERS]
SUBJECT, STYLE, BOTH = (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)
NORM, ENCODER = "diffusion_model_middle_block_1_norm", "0_transformer_text_model_encoder_layers_0_mlp_fc1"


class Networks(SimpleNamespace):
    """As extensions-builtin/Lora/networks.py, but a weight is a number to which each network adds one."""

    def __init__(self):
        super().__init__(
            loaded_networks=[],
            networks_in_memory={},
            extra_network_lora=SimpleNamespace(errors={}),
            rewritten=[],
            broken=set(),
        )
        self.network_apply_weights = self.own_apply
        self.network_forward = self.own_forward

    def own_forward(self, module, values, _original_forward):
        return values + sum(
            net.modules.get(module.network_layer_name, 0) * net.unet_multiplier
            for net in self.loaded_networks
        )

    def own_apply(self, module):
        wanted = tuple(
            (net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in self.loaded_networks
        )
        if module.network_current_names == wanted:
            return
        self.network_restore_weights_from_backup(module)
        for net in self.loaded_networks:
            if (net.name, module.network_layer_name) in self.broken:
                self.extra_network_lora.errors[net.name] = self.extra_network_lora.errors.get(net.name, 0) + 1
                continue
            module.weight += net.modules.get(module.network_layer_name, 0) * net.unet_multiplier
        module.network_current_names = wanted
        self.rewritten.append(module.network_layer_name)

    def network_restore_weights_from_backup(self, module):
        module.weight = module.backup


def network(name, added, places):
    path = FILES / f"{name}.safetensors"
    mtime = path.stat().st_mtime if path.exists() else None
    strengths = {"te_multiplier": 1, "unet_multiplier": 1, "dyn_dim": None}
    return Network(
        name=name,
        network_on_disk=SimpleNamespace(filename=str(path)),
        modules=dict.fromkeys(places, added),
        mtime=mtime,
        **strengths,
    )


class Network(SimpleNamespace):
    """One that can be referred to weakly, as the host's."""


class Denoiser(torch.nn.Module):
    """Its forward applies networks to each of its layers, which for brevity include one of a text encoder."""

    def __init__(self, networks, layers):
        super().__init__()
        self.networks, self.layers = networks, layers

    def forward(self):
        for layer in self.layers:
            self.networks.network_apply_weights(layer)


class Checkpoint:
    def __init__(self, networks, layers):
        self.model = SimpleNamespace(diffusion_model=Denoiser(networks, layers))
        self.network_layer_mapping = {layer.network_layer_name: layer for layer in layers}


def pair_lora(role, on_text_encoder):
    return PairLora(role, role, lora_file(path=FILES / f"{role}.safetensors"), 1.0, on_text_encoder)


def lora_file(path=None, dialects=("kohya",), in_header=False, unused=(), roles=("up", "down")):
    target = SimpleNamespace(naming=NATIVE)
    modules = [SimpleNamespace(keys=dict.fromkeys(roles), target=target)]
    return SimpleNamespace(
        path=path,
        dialects=frozenset(dialects),
        scale_from_metadata=in_header,
        unused_keys=unused,
        modules=modules,
    )


class Host:
    """A host with a model of a few layers, the pair loaded after one other network."""

    def __init__(self, text_encoder=("subject", "style")):
        self.networks = Networks()
        new = {"weight": 1000, "backup": 1000, "network_current_names": ()}
        self.model = [SimpleNamespace(network_layer_name=name, **new) for name in [*NAMES, NORM, ENCODER]]
        self.checkpoint = Checkpoint(self.networks, self.model)
        self.other, self.subject = network("other", 1, NAMES), network("subject", 10, [*NAMES, NORM, ENCODER])
        self.style = network("style", 100, [*NAMES, ENCODER])
        self.networks.loaded_networks[:] = [self.other, self.subject, self.style]
        self.pair = Pair(
            tuple(pair_lora(role, role in text_encoder) for role in ("subject", "style")),
            LAYERS,
            ["middle_block.1.norm"],
            None,
        )
        self.switch = self.new_switch()
        self.own_apply = self.networks.network_apply_weights

    def new_switch(self):
        return A1111Switch(self.networks, self.checkpoint, self.pair)

    def start(self):
        self.switch.networks_loaded()
        self.switch.attach()
        return self

    def forward(self):
        self.checkpoint.model.diffusion_model()
        return [module.weight - 1000 for module in self.model]


def on_layers(*strengths):
    return dict(zip(LAYERS, strengths, strict=True))


def test_each_layer_gets_its_strengths_beside_the_other_networks():
    host = Host().start()
    host.switch.apply(on_layers(SUBJECT, STYLE, BOTH))
    assert host.forward() == [11, 101, 111, 10, 110]


def test_half_levels_scale_what_the_host_has_and_leave_its_multipliers_as_they_were():
    host = Host().start()
    host.subject.unet_multiplier = 0.75
    host.switch.apply(on_layers((0.5, 1.0), (0.0, 0.5), (0.5, 0.5)))
    half = 10 * (0.75 * 0.5)
    assert host.forward()[:4] == [1 + half + 100, 1 + 50, 1 + half + 50, half]
    host.switch.apply({LAYERS[0]: (1.0, 0.5)})
    host.networks.rewritten.clear()
    assert host.forward()[0] == 1 + 7.5 + 50
    assert host.networks.rewritten == [NAMES[0]]
    assert (host.subject.unet_multiplier, host.style.unet_multiplier) == (0.75, 1)


def test_what_is_added_to_the_outputs_is_scaled_too():
    host = Host().start()
    host.switch.apply(on_layers((0.5, 1.0), SUBJECT, STYLE))
    assert [host.networks.network_forward(module, 0, None) for module in host.model[:3]] == [106, 11, 101]
    assert host.subject.unet_multiplier == 1


def test_multipliers_are_as_they_were_after_a_layer_that_failed():
    host = Host().start()
    host.networks.broken.add(("style", NAMES[0]))
    host.switch.apply(on_layers((0.5, 0.5), SUBJECT, STYLE))
    with pytest.raises(HostError):
        host.forward()
    assert (host.subject.unet_multiplier, host.style.unet_multiplier) == (1, 1)


def test_a_strength_of_another_network_that_changes_between_steps_is_followed_by_all_its_layers():
    host = Host().start()
    host.switch.apply(on_layers(SUBJECT, STYLE, BOTH))
    host.forward()
    host.other.unet_multiplier = 5
    assert host.forward() == [15, 105, 115, 10, 110]
    host.networks.rewritten.clear()
    assert host.forward() == [15, 105, 115, 10, 110]
    assert not host.networks.rewritten


def test_a_norm_follows_its_layer_and_the_text_encoder_its_rule():
    host = Host(text_encoder=("style",)).start()
    host.switch.apply(on_layers(STYLE, STYLE, STYLE))
    assert host.forward() == [101, 101, 101, 0, 100]


def test_afterwards_the_host_puts_every_layer_right_by_itself():
    host = Host().start()
    host.switch.apply(on_layers(SUBJECT, STYLE, BOTH))
    host.forward()
    host.switch.detach()
    host.switch.detach()
    assert host.networks.network_apply_weights == host.own_apply
    host.networks.loaded_networks[:] = []
    assert host.forward() == [0] * 5


def test_what_a_dead_run_left_is_undone_by_the_next():
    host = Host().start()
    again = host.new_switch()
    again.networks_loaded()
    again.attach()
    again.detach()
    assert host.networks.network_apply_weights == host.own_apply


def test_a_layer_that_the_host_cannot_merge_stops_the_run_and_is_not_taken_for_done():
    host = Host().start()
    host.networks.broken.add(("style", NAMES[1]))
    host.switch.apply(on_layers(*[STYLE] * 3))
    with pytest.raises(HostError, match=f"could not apply the LoRA style to the layer {NAMES[1]}"):
        host.forward()
    host.switch.detach()
    assert host.model[1].network_current_names == ()
    host.networks.loaded_networks[:] = []
    assert host.forward() == [0] * 5


def test_a_network_the_host_did_not_load_is_named():
    host = Host()
    host.networks.loaded_networks[:] = [host.other, host.subject]
    with pytest.raises(HostError, match=r"did not load the style LoRA .*style.safetensors"):
        host.switch.networks_loaded()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)
    path = tmp_path / "subject.safetensors"
    path.write_bytes(b"one")
    os.utime(path, (1.7e9, 1.7e9))
    return path


class Keeper:
    """A host that keeps `net`, loaded from `file`, and reloads it if the file is newer than that."""

    def __init__(self, file):
        self.host, self.file = Host(), file
        subject, style = self.host.pair.loras
        moved = SimpleNamespace(**{**vars(subject.file), "path": file})
        self.host.pair = replace(self.host.pair, loras=(replace(subject, file=moved), style))
        self.net = self.load()

    def load(self):
        net = network("subject", 10, NAMES)
        net.network_on_disk.filename, net.mtime = str(self.file), self.file.stat().st_mtime
        return net

    def run(self):
        """Whether the host loads the subject anew in a run of K-LoRA."""
        before, switch = self.net, self.host.new_switch()
        switch.expire_loaded()
        if self.file.stat().st_mtime > self.net.mtime:
            self.net = self.load()
        networks = self.host.networks
        networks.loaded_networks[:] = [self.net, self.host.style]
        networks.networks_in_memory = {"subject": self.net}
        switch.networks_loaded()
        return self.net is not before


def test_what_the_host_keeps_of_a_file_is_loaded_anew_when_another_content_is_there(file):
    """Replaced by one of the same size and time, by an older one, or by a newer one."""
    keeper = Keeper(file)
    keeper.run()
    assert not keeper.run()
    for content, when in ((b"two", 1.7e9), (b"three", 1.6e9), (b"four", 1.65e9)):
        file.write_bytes(content)
        os.utime(file, (when, when))
        assert keeper.run()
        assert not keeper.run()


def test_what_the_host_kept_before_the_first_run_is_not_trusted(file):
    """Nobody knows which content it was loaded from."""
    keeper = Keeper(file)
    keeper.host.networks.networks_in_memory = {"subject": keeper.net}
    assert keeper.run()


def test_copies_of_two_contents_have_two_names(tmp_path):
    """The host remembers by name what a layer holds and what metadata a file has."""
    host, named = Host(), []
    host.networks.network = SimpleNamespace(
        NetworkOnDisk=lambda name, filename: SimpleNamespace(name=name, filename=filename)
    )

    def load_network(name, on_disk):
        named.append(name)
        net = network("subject", 10, NAMES)
        net.name, net.network_on_disk = name, on_disk
        return net

    host.networks.load_network = load_network
    subject, style = host.pair.loras
    foreign = SimpleNamespace(**{**vars(subject.file), "dialects": frozenset({"diffusers PEFT"})})
    for content in ("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"):
        host.pair = replace(
            host.pair,
            loras=(replace(subject, file=foreign), style),
            readable=lambda _, content=content: tmp_path / f"{content}.safetensors",
        )
        host.new_switch().networks_loaded()
    assert len(set(named)) == 2
    assert all(name.startswith("K-LoRA subject ") for name in named)


@pytest.mark.parametrize(
    ("given", "reads"),
    [
        ({}, True),
        ({"in_header": True}, False),
        ({"dialects": ("diffusers PEFT",)}, False),
        ({"dialects": ("kohya", "kohya with diffusers names")}, True),
        ({"dialects": ("kohya", "kohya (lora_unet__)")}, False),
        ({"dialects": ("kohya (_orig_mod)",)}, False),
        ({"unused": ("lora_unet_x.alpha",)}, False),
        ({"roles": ("up", "down", "peft_magnitude")}, False),
    ],
)
def test_only_underscore_names_are_left_to_the_hosts_loader(given, reads):
    assert host_reads(lora_file(**given)) is reads


FIRST_UPSAMPLER = "lora_unet_up_blocks_0_upsamplers_0_conv"


@pytest.mark.parametrize(
    ("key", "beside", "reads"),
    [
        ("lora_unet_add_embedding_linear_1", None, False),
        ("lora_unet_label_emb_0_0", None, True),
        (FIRST_UPSAMPLER, "lora_unet_up_blocks_0_attentions_0_proj_in", False),
        (FIRST_UPSAMPLER, "lora_unet_up_blocks_3_attentions_0_proj_in", True),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", "lora_unet_up_blocks_0_attentions_0_proj_in", True),
    ],
    ids=["size embedding", "its native name", "SDXL's first upsampler", "SD 1.5's", "SDXL's second"],
)
def test_a_file_with_names_that_the_hosts_loader_loses_is_converted(tmp_path, key, beside, reads):
    """It makes an upsampler's name as SD 1.5 has it, whatever the checkpoint."""
    tensors = {}
    for stem in filter(None, (key, beside)):
        tensors |= {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert host_reads(read_lora(tmp_path / "a.safetensors")) is reads
