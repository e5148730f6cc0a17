"""AUTOMATIC1111 1.10: the Lora extension's own per-layer apply, given the chosen network of each layer.

The patched layer forwards look `networks.network_apply_weights` up at every call and apply whatever `networks.loaded_networks` holds. While
attached, that function is ours: a layer is handed to the host's with just the networks it should have, once at the start and once
a switch; in between it costs one set look-up a layer. Each layer remembers what it has (`network_current_names`), so whatever runs next puts
it right by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

from klora.core.blocks import leader_of
from klora.core.families import FAMILIES, of_checkpoint
from klora.core.families.base import DIFFUSERS
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile
from klora.core.rewrite import is_in
from klora.errors import HostError
from klora.hosts.base import Member, Pair, Strengths, present, still_loaded
from klora.hosts.sizes import Padded, Sizes, native_sizes

DENOISER = "diffusion_model"
LATENT_CHANNELS, INPAINTING_CHANNELS = 4, 9


class A1111:
    """`Adapter` of A1111.

    Args:
        networks: the module of the host's Lora extension.
    """

    MARK = "networks.network_apply_weights (AUTOMATIC1111)"

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    @staticmethod
    def drives(networks: Any) -> bool:
        """Whether this Lora extension is A1111's, unless there is a patcher: reForge has these functions too, and they do nothing."""
        return hasattr(networks, "network_apply_weights") and hasattr(
            networks, "network_restore_weights_from_backup"
        )

    def base_of(self, model: Any) -> str | None:
        return of_checkpoint(model, model.model.diffusion_model)

    def sizes_of(self, model: Any) -> Sizes:
        known = dict(model.model.diffusion_model.named_modules())
        base = self.base_of(model)
        return native_sizes(
            FAMILIES[base].modules if base else (),
            lambda path: getattr(known.get(path), "weight", None),
            _padded_for_inpainting,
        )

    def switch(self, model: Any, pair: Pair) -> A1111Switch:
        return A1111Switch(self._networks, model, pair)


class A1111Switch:
    """`PairSwitch` of A1111's UNet; its text encoders get the members that are told to be on them."""

    def __init__(self, networks: Any, model: Any, pair: Pair) -> None:
        self._networks = networks
        self._loaded_model = ref(model)
        self._members = pair.members
        self._readable = pair.readable
        self._layer_of = {_network_name(name): name for name in pair.layers}
        for name in pair.unscored:
            self._layer_of.setdefault(_network_name(name), leader_of(name, pair.layers))
        self._names_of: dict[str, list[str]] = {}
        for network_name, layer in self._layer_of.items():
            self._names_of.setdefault(layer, []).append(network_name)
        self._pair: dict[str, Any] = {}
        self._others: list[Any] = []
        self._on_text_encoder: list[Any] = []
        self._on_layers: dict[str, Strengths] = {}
        self._settled: set[str] = set()
        self._strengths_of_others: list[tuple] = []
        self._watch: Any = None
        self._failure: BaseException | None = None
        self._originals: dict[str, Callable] = {}
        self._versions: dict[str, str] = {}

    @property
    def _model(self) -> Any:
        return still_loaded(self._loaded_model)

    def tags(self) -> Sequence[tuple[str, float]]:
        """Name and weight of what the host is to load, which it will do anew where it keeps an earlier content of the file."""
        named = [member for member in self._members if host_reads(member.file)]
        self._versions = {_place(member.file.path): version_of(member.file.path) for member in named}
        for net in (*self._networks.loaded_networks, *self._networks.networks_in_memory.values()):
            version = self._versions.get(_place(net.network_on_disk.filename))
            if version is not None and getattr(net, "klora_version", None) != version:
                net.mtime = float("-inf")  # the host loads a network anew whose file is younger than this
        return [(member.name, member.weight) for member in named]

    def networks_loaded(self) -> None:
        loaded = {_place(net.network_on_disk.filename): net for net in self._networks.loaded_networks}
        self._others = self._of_the_prompt()
        self._pair = {member.role: self._network(member, loaded) for member in self._members}
        chosen = [self._pair[member.role] for member in self._members if member.on_text_encoder]
        self._on_text_encoder = [
            net for net in chosen if not all(key.startswith(DENOISER) for key in net.modules)
        ]
        self._networks.loaded_networks[:] = [*self._others, *self._pair.values()]
        self._forget_earlier_files()
        self._settled.clear()

    def _of_the_prompt(self) -> list[Any]:
        """What the host has loaded beside the pair."""
        own_files = {_place(member.file.path) for member in self._members}
        return [
            net
            for net in self._networks.loaded_networks
            if _place(net.network_on_disk.filename) not in own_files
        ]

    def _network(self, member: Member, loaded: Mapping[str, Any]) -> Any:
        """The host's network of a member: loaded by the host, or by its loader from a copy that it can read.

        The host may also have passed over the file's tag: it finds LoRAs in a list that any client may have it make anew meanwhile.
        """
        path, name = member.file.path, member.name
        if not host_reads(member.file):
            path = self._readable(member.file)
            name = f"K-LoRA {name} {path.name[:12]}"  # the host remembers metadata and merged layers by this name
        elif _place(path) in loaded:
            net = loaded[_place(path)]
            net.klora_version = self._versions.get(_place(path))
            return net
        try:
            net = self._networks.load_network(name, self._networks.network.NetworkOnDisk(name, str(path)))
        except Exception as error:
            raise HostError(
                f"The WebUI did not load the {member.role} LoRA {member.file.path}: {str(error) or type(error).__name__}"
            ) from error
        net.network_on_disk.filename = str(member.file.path)
        net.te_multiplier = net.unet_multiplier = member.weight
        net.dyn_dim = None
        net.mentioned_name = None
        return net

    def _forget_earlier_files(self) -> None:
        """Put back the layers that may hold an earlier file under the name of one of the pair.

        A layer remembers its networks by name only. The model remembers which objects of these names its layers have been given.
        """
        known = self._model.__dict__.setdefault("klora_networks", {})
        new = {
            net.name: ref(net)
            for net in self._pair.values()
            if net.name not in known or known[net.name]() is not net
        }
        for module in self._model.network_layer_mapping.values() if new else ():
            if any(entry[0] in new for entry in getattr(module, "network_current_names", ())):
                self._undo(module)
        known.update(new)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.attach()
        try:
            yield
        finally:
            self.detach()

    def attach(self) -> None:
        for name, ours in (("network_apply_weights", self._apply), ("network_forward", self._forward)):
            current = getattr(self._networks, name)
            left_over = getattr(current, "__self__", None)
            if left_over is self:
                continue
            if left_over is not None and type(left_over).__name__ == type(self).__name__:
                left_over.detach()
                current = getattr(self._networks, name)
            self._originals[name] = current
            setattr(self._networks, name, ours)
        if self._watch is None:
            denoiser = self._model.model.diffusion_model
            self._watch = denoiser.register_forward_pre_hook(self._follow_other_networks)

    def apply(self, strengths: Mapping[str, Strengths]) -> None:
        """The layers take their new networks at their next forward, where the host itself applies (its memory modes move them)."""
        self._on_layers.update(strengths)
        for layer in strengths:
            self._settled.difference_update(self._names_of[layer])

    def fail(self, error: BaseException) -> None:
        self._failure = error

    def detach(self) -> None:
        for name, original in self._originals.items():
            setattr(self._networks, name, original)
        self._originals.clear()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._on_layers.clear()
        self._settled.clear()

    def leave(self) -> None:
        self._networks.loaded_networks[:] = self._of_the_prompt()

    def _apply(self, module: Any) -> None:
        if self._failure is not None:
            raise self._failure
        name = getattr(module, "network_layer_name", None)
        if name in self._settled:
            return
        original = self._originals["network_apply_weights"]
        if name is None:
            original(module)
            return
        errors = self._networks.extra_network_lora.errors
        before = dict(errors)
        with self._loaded(self._wanted(name)):
            original(module)
        if errors != before:
            self._undo(module)
            failed = ", ".join(sorted(net for net in errors if errors[net] != before.get(net)))
            raise HostError(
                f"The WebUI could not apply the LoRA {failed} to the layer {name}: it does not fit this checkpoint, or memory ran out."
            )
        self._settled.add(name)

    def _follow_other_networks(self, _denoiser: Any, _inputs: Any) -> None:
        """Other extensions change the strengths of the prompt's networks from step to step: then every layer is to be applied anew.

        Looked at when the denoiser is called, once all callbacks of the step are done.
        """
        strengths = [(net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in self._others]
        if strengths != self._strengths_of_others:
            self._strengths_of_others = strengths
            self._settled.clear()

    def _forward(self, module: Any, values: Any, original_forward: Callable) -> Any:
        """The same for the host's option to add networks to the outputs instead of the weights (`lora_functional`)."""
        if self._failure is not None:
            raise self._failure
        with self._loaded(self._wanted(getattr(module, "network_layer_name", None))):
            return self._originals["network_forward"](module, values, original_forward)

    def _undo(self, module: Any) -> None:
        """The host marks a layer as done even when it failed; take that back."""
        self._networks.network_restore_weights_from_backup(module)
        module.network_current_names = ()

    def _wanted(self, name: str | None) -> list[tuple[Any, float]]:
        """The networks that a module is to have, each with its strength."""
        if name is None or not name.startswith(DENOISER):
            return [(net, 1.0) for net in (*self._others, *self._on_text_encoder)]
        strengths = self._on_layers.get(self._layer_of.get(name, ""), (0.0, 0.0))
        return [
            *((net, 1.0) for net in self._others),
            *((self._pair[role], strength) for role, strength in present(strengths)),
        ]

    @contextmanager
    def _loaded(self, wanted: list[tuple[Any, float]]) -> Iterator[None]:
        """These networks alone are loaded, with multipliers that are scaled by their strengths.

        The host reads a multiplier whenever it computes a layer, from the one network that all its modules know: a copy of the
        network would leave them at the old one.
        """
        loaded = self._networks.loaded_networks
        before = list(loaded)
        multipliers = [(net, net.unet_multiplier) for net, strength in wanted if strength != 1]
        loaded[:] = [net for net, _ in wanted]
        try:
            for net, strength in wanted:
                if strength != 1:
                    net.unet_multiplier *= strength
            yield
        finally:
            for net, multiplier in multipliers:
                net.unet_multiplier = multiplier
            loaded[:] = before


def host_reads(lora: LoraFile) -> bool:
    """Whether A1111's loader understands a file's keys as they are: it knows kohya's underscore names, but for `_LOST`."""
    lost = any(
        module.target.naming == DIFFUSERS and module.target.module.native in _LOST for module in lora.modules
    )
    return is_in(lora, ("kohya", "kohya with diffusers names")) and not lost


_LOST = frozenset(("label_emb.0.0", "label_emb.0.2", "out.0", "output_blocks.2.2.conv"))
"""Modules that it leaves out without a word where a key has diffusers' name of them (convert_diffusers_name_to_compvis): it knows no
add_embedding and no conv_norm_out, and takes the first upsampler to be where SD 1.5 has it, which has no attention before it."""


def _padded_for_inpainting(shape: tuple[int, ...]) -> Padded:
    """The host gives a change of the 4 latent channels the 5 more that an inpainting model's first layer has (network_apply_weights)."""
    if len(shape) != 4 or shape[1] != INPAINTING_CHANNELS:
        return {}
    return dict.fromkeys(("LoCon", "full diff"), (LATENT_CHANNELS * shape[2] * shape[3],))


def _network_name(layer: str) -> str:
    return f"{DENOISER}_{layer.replace('.', '_')}"


def _place(path: Any) -> str:
    return str(Path(path).resolve())
