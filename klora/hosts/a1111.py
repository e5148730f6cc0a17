"""AUTOMATIC1111 1.10: its Lora extension applies networks layer by layer, and K-LoRA tells it which ones.

The host's Lora extension patches the forward of every layer so that it calls
`networks.network_apply_weights`, which applies everything in `networks.loaded_networks`. While a switch is
attached it takes the place of that function. It calls the host's own with only the networks that the layer
should have, once at the start and once for each switch; otherwise it costs one set look-up per layer. Each
layer remembers which networks it has (`network_current_names`), so nothing has to be undone: whatever runs
next makes the host correct the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

from klora.core.blocks import leader_of
from klora.core.families import of_checkpoint
from klora.core.families.base import DIFFUSERS, HOSTS_OWN, Family
from klora.core.families.unlisted import Place, unlisted
from klora.core.file_state import version_of
from klora.core.lora_file import LoraFile
from klora.core.rewrite import is_in
from klora.errors import HostError
from klora.hosts.base import Pair, PairLora, Strengths, not_loaded, present, still_loaded
from klora.hosts.sizes import Padded, Sizes, native_sizes
from klora.hosts.unlisted import kept, name_of_checkpoint

UNET_NAME_PREFIX = "diffusion_model_"
"""The host's names for layers of the UNet begin with this; those for layers of text encoders do not."""
LATENT_CHANNELS, INPAINTING_CHANNELS = 4, 9


class A1111:
    """`Adapter` for A1111.

    Args:
        networks: the module of the host's Lora extension.
    """

    MARK = "networks.network_apply_weights (AUTOMATIC1111)"

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    @staticmethod
    def drives(networks: Any) -> bool:
        """Whether this Lora extension is A1111's.

        To be asked only if the host has no patcher: reForge has these functions as well, but there they do
        nothing.
        """
        return hasattr(networks, "network_apply_weights") and hasattr(
            networks, "network_restore_weights_from_backup"
        )

    def family_of(self, model: Any) -> Family:
        return of_checkpoint(model, model.model.diffusion_model) or kept(model, self._unlisted)

    def sizes_of(self, model: Any) -> Sizes:
        known = dict(model.model.diffusion_model.named_modules())
        return native_sizes(
            self.family_of(model).modules,
            lambda path: getattr(known.get(path), "weight", None),
            _padded_for_inpainting,
        )

    def switch(self, model: Any, pair: Pair) -> A1111Switch:
        return A1111Switch(self._networks, model, pair)

    def _unlisted(self, model: Any) -> Family:
        """Of keys without dots, which alone the host's loader knows (networks.load_network)."""
        shapes = {
            path: tuple(module.weight.shape)
            for path, module in model.model.diffusion_model.named_modules()
            if getattr(module, "weight", None) is not None
        }
        path_of = {_network_name(path): path for path in shapes}
        convert = self._networks.convert_diffusers_name_to_compvis

        def place_of(key: str) -> Place | None:
            names = (
                (convert(key, False), key.replace("lora_unet_", UNET_NAME_PREFIX)) if "." not in key else ()
            )
            return next((Place(path_of[name]) for name in names if name in path_of), None)

        return unlisted(name_of_checkpoint(model), shapes, place_of, {})


class A1111Switch:
    """`PairSwitch` for A1111's UNet. Its text encoders get the LoRAs that have `on_text_encoder`."""

    def __init__(self, networks: Any, model: Any, pair: Pair) -> None:
        self._networks = networks
        self._loaded_model = ref(model)
        self._loras = pair.loras
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

    def expire_loaded(self) -> None:
        """Expire every network in the host's memory that may not have the present content of its file."""
        paths = [lora.file.path for lora in self._loaded_by_tag()]
        self._versions = {_place(path): version_of(path) for path in paths}
        for net in (*self._networks.loaded_networks, *self._networks.networks_in_memory.values()):
            version = self._versions.get(_place(net.network_on_disk.filename))
            if version is not None and getattr(net, "klora_version", None) != version:
                net.mtime = float("-inf")  # the host reloads a network whose file is newer than this

    def tags(self) -> Sequence[tuple[str, float]]:
        return [(lora.name, lora.weight) for lora in self._loaded_by_tag()]

    def networks_loaded(self) -> None:
        loaded = {_place(net.network_on_disk.filename): net for net in self._networks.loaded_networks}
        self._others = self._of_the_prompt()
        self._pair = {lora.role: self._network(lora, loaded) for lora in self._loras}
        chosen = [self._pair[lora.role] for lora in self._loras if lora.on_text_encoder]
        self._on_text_encoder = [
            net for net in chosen if not all(key.startswith(UNET_NAME_PREFIX) for key in net.modules)
        ]
        self._networks.loaded_networks[:] = [*self._others, *self._pair.values()]
        self._forget_earlier_files()
        self._settled.clear()

    def _of_the_prompt(self) -> list[Any]:
        """The networks that the host has loaded besides the pair."""
        own_files = {_place(lora.file.path) for lora in self._loras}
        return [
            net
            for net in self._networks.loaded_networks
            if _place(net.network_on_disk.filename) not in own_files
        ]

    def _loaded_by_tag(self) -> list[PairLora]:
        """The LoRAs whose files the host's loader understands as they are."""
        return [lora for lora in self._loras if host_reads(lora.file)]

    def _network(self, lora: PairLora, loaded: Mapping[str, Any]) -> Any:
        """The host's network for a LoRA: the one that it has loaded, or one made from a readable copy.

        The loader also steps in for a tag that the host ignored: it looks LoRAs up in a list that it may have
        been rebuilding at that moment, because some client asked it to.
        """
        path, name = lora.file.path, lora.name
        if not host_reads(lora.file):
            path = self._readable(lora.file)
            name = f"K-LoRA {name} {path.name[:12]}"  # under this name the host remembers metadata and layers
        elif _place(path) in loaded:
            net = loaded[_place(path)]
            net.klora_version = self._versions.get(_place(path))
            return net
        try:
            net = self._networks.load_network(name, self._networks.network.NetworkOnDisk(name, str(path)))
        except Exception as error:
            raise not_loaded(lora, str(error) or type(error).__name__) from error
        net.network_on_disk.filename = str(lora.file.path)
        net.te_multiplier = net.unet_multiplier = lora.weight
        net.dyn_dim = None
        net.mentioned_name = None
        return net

    def _forget_earlier_files(self) -> None:
        """Restore the layers that may still have an earlier file's network under the name of one of the pair.

        A layer remembers its networks only by name. So the model keeps, in an attribute of ours, the network
        that each of these names last stood for.
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
    def attached(self) -> Iterator[None]:
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
        """Each layer takes its new networks in its next forward.

        The host applies networks there too, because its memory modes move layers between devices.
        """
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
                f"The WebUI could not apply the LoRA {failed} to the layer {name}: it does not fit this "
                "checkpoint, or memory ran out."
            )
        self._settled.add(name)

    def _follow_other_networks(self, _denoiser: Any, _inputs: Any) -> None:
        """Have every layer applied again if the multipliers of the prompt's networks have changed.

        Some extensions change them from step to step. The denoiser is called after all callbacks of the step,
        so their changes are seen here.
        """
        strengths = [(net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in self._others]
        if strengths != self._strengths_of_others:
            self._strengths_of_others = strengths
            self._settled.clear()

    def _forward(self, module: Any, values: Any, original_forward: Callable) -> Any:
        """As `_apply`, for the host's option `lora_functional`, which adds networks to a layer's outputs."""
        if self._failure is not None:
            raise self._failure
        with self._loaded(self._wanted(getattr(module, "network_layer_name", None))):
            return self._originals["network_forward"](module, values, original_forward)

    def _undo(self, module: Any) -> None:
        """Restore a layer's weight and clear its list of networks, which the host writes even on failure."""
        self._networks.network_restore_weights_from_backup(module)
        module.network_current_names = ()

    def _wanted(self, name: str | None) -> list[tuple[Any, float]]:
        """The networks that a module should have, each with its strength."""
        if name is None or not name.startswith(UNET_NAME_PREFIX):
            return [(net, 1.0) for net in (*self._others, *self._on_text_encoder)]
        strengths = self._on_layers.get(self._layer_of.get(name, ""), (0.0, 0.0))
        return [
            *((net, 1.0) for net in self._others),
            *((self._pair[role], strength) for role, strength in present(strengths)),
        ]

    @contextmanager
    def _loaded(self, wanted: list[tuple[Any, float]]) -> Iterator[None]:
        """A context in which only these networks are loaded, with their multipliers scaled by the strengths.

        The multipliers of the networks themselves are changed and restored: the modules of a network refer to
        it, and a copy of it would leave them at the old multiplier.
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
    """Whether A1111's loader understands a file's keys as they are. It knows kohya's names, save `_LOST`."""
    lost = any(
        module.target.naming == DIFFUSERS and module.target.module.native in _LOST for module in lora.modules
    )
    return is_in(lora, ("kohya", "kohya with diffusers names", HOSTS_OWN)) and not lost


_LOST = frozenset(("label_emb.0.0", "label_emb.0.2", "out.0", "output_blocks.2.2.conv"))
"""Modules that A1111 leaves out without a word if a key has diffusers' name for them.

Its convert_diffusers_name_to_compvis knows no add_embedding and no conv_norm_out, and looks for the first
upsampler where SD 1.5 has it, which has no attention before it.
"""


def _padded_for_inpainting(shape: tuple[int, ...]) -> Padded:
    """The first layer of an inpainting model has 9 input channels, 4 of them latents.

    The host pads a change for 4 channels with zeros to fit it (network_apply_weights).
    """
    if len(shape) != 4 or shape[1] != INPAINTING_CHANNELS:
        return {}
    return dict.fromkeys(("LoCon", "full diff"), (LATENT_CHANNELS * shape[2] * shape[3],))


def _network_name(layer: str) -> str:
    return UNET_NAME_PREFIX + layer.replace(".", "_")


def _place(path: Any) -> str:
    return str(Path(path).resolve())
