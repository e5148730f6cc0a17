"""Stand-ins for the patchers of the Forge family.

They keep their rules: when a clone is merged, what is backed up, and who reads which dict.
"""

import importlib
import sys
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from uuid import uuid4

import torch
from torch import nn

WIDTH = 4
CPU = torch.device("cpu")


class Qkv(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_attn, self.proj, self.norm = Qkv(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)


class Denoiser(nn.Module):
    hidden_size = WIDTH

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([Block(), Block()])


class KModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.diffusion_model = Denoiser()
        self.storage_dtype = self.computation_dtype = torch.float32
        self.requires_grad_(False)


def split(key):
    path, _, name = key.rpartition(".")
    return path, name


def put(model, key, value):
    path, name = split(key)
    setattr(attrgetter(path)(model), name, nn.Parameter(value, requires_grad=False))


def merged(patches, weight):
    """A weight with its patches, as every host of the family adds them."""
    weight = weight.clone()
    for strength, value, _, *more in patches:
        offset = more[0] if more else None
        kind, parts = value
        delta = parts[0] if kind == "diff" else parts[0] @ parts[1]
        (weight if offset is None else weight.narrow(*offset)).add_(strength * delta)
    return weight


class Patcher:
    """Common to all: clones share the model; the host loads the clone that it samples with."""

    load_device = offload_device = current_device = CPU
    weight_inplace_update = False
    fused = True

    def __init__(self, model):
        self.model = model
        self.model_options = {}

    def clone(self):
        made = type(self)(self.model)
        made.model_options = {name: list(values) for name, values in self.model_options.items()}
        self.copy_to(made)
        return made

    def add_conditioning_modifier(self, modifier):
        self.model_options.setdefault("conditioning_modifiers", []).append(modifier)


class LoraLoader:
    """Forge merges when the names of the patches differ from those of the last merge.

    A packed weight (GGUF) remains the same object and gets other data.
    """

    def __init__(self, model):
        self.model, self.backup, self.online_backup, self.loaded_hash, self.fail_at = (
            model,
            {},
            [],
            "[]",
            None,
        )

    def refresh(self, lora_patches, offload_device, force_refresh=False):
        names = str(list(lora_patches))
        if names == self.loaded_hash and not force_refresh:
            return
        for layer in set(self.online_backup):
            del layer.forge_online_loras
        self.online_backup = []
        for key, weight in self.backup.items():
            path, name = split(key)
            setattr(attrgetter(path)(self.model), name, weight)
        self.backup = {}
        together = {}
        for (_, _, _, online), patches in lora_patches.items():
            for key, added in patches.items():
                together.setdefault((key, online), []).extend(added)
        for (key, online), patches in together.items():
            layer, name = attrgetter(split(key)[0])(self.model), split(key)[1]
            if online:
                layer.forge_online_loras = {**getattr(layer, "forge_online_loras", {}), name: patches}
                self.online_backup.append(layer)
                continue
            if self.model.fail_at == key:
                raise torch.cuda.OutOfMemoryError("merge")
            weight = getattr(layer, name)
            if self.model.packed:
                self.backup[key] = nn.Parameter(weight.data, requires_grad=False)
                weight.data = merged(patches, weight)
            else:
                self.backup[key] = weight
                put(self.model, key, merged(patches, weight))
        self.loaded_hash = names


class ForgePatcher(Patcher):
    def __init__(self, model):
        super().__init__(model)
        self.lora_patches = {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def copy_to(self, made):
        made.lora_patches = dict(self.lora_patches)

    def add_patches(self, *, filename, patches, strength_patch, online_mode=False):
        own = {}
        for key, offset, value in patches:
            own.setdefault(key, []).append([strength_patch, value, 1.0, offset, None])
        self.lora_patches[(filename, strength_patch, 1.0, online_mode)] = own

    def load_it(self):
        if self.model.loaded is not self:
            self.model.loaded = self
            self.lora_loader.refresh(self.lora_patches, self.offload_device)

    def weight(self, key):
        layer, name = attrgetter(split(key)[0])(self.model), split(key)[1]
        return merged(getattr(layer, "forge_online_loras", {}).get(name, ()), getattr(layer, name))


class LowVramPatch:
    def __init__(self, key, patches):
        self.key, self.patches = key, patches

    def __call__(self, weight):
        return merged(self.patches[self.key], weight)


class ComfyPatcher(Patcher):
    """Forge Neo and reForge merge when the uuid differs. Half of the layers may be offloaded, unmerged."""

    shape = staticmethod(lambda strength, value, offset, online: (strength, value, 1.0, offset, None, online))

    def __init__(self, model):
        super().__init__(model)
        self.patches, self.patches_uuid = {}, uuid4()
        if not hasattr(model, "backup"):
            model.backup, model.current_weight_patches_uuid = {}, None
        self.backup = model.backup

    def copy_to(self, made):
        made.patches, made.patches_uuid = (
            {key: list(patches) for key, patches in self.patches.items()},
            self.patches_uuid,
        )

    def add_patches(self, *, filename, patches, strength_patch, online_mode=False):
        for key, offset, value in patches:
            self.patches.setdefault(key, []).append(self.shape(strength_patch, value, offset, online_mode))
        self.patches_uuid = uuid4()

    def load_it(self):
        if self.model.current_weight_patches_uuid == self.patches_uuid:
            return
        for key, backup in self.backup.items():
            put(self.model, key, backup.weight)
        self.backup.clear()
        for layer in self.model.modules():
            layer.weight_function = []
        for index, (key, patches) in enumerate(self.patches.items()):
            if any(len(patch) == 6 and patch[5] for patch in patches) or (
                self.model.half_offloaded and index % 2
            ):
                attrgetter(split(key)[0])(self.model).weight_function = [LowVramPatch(key, self.patches)]
            else:
                self.patch_weight_to_device(key)
        self.model.current_weight_patches_uuid = self.patches_uuid

    def patch_weight_to_device(self, key, device_to=None):
        if self.model.fail_at == key:
            raise torch.cuda.OutOfMemoryError("merge")
        weight = attrgetter(key)(self.model)
        if key not in self.backup:
            self.backup[key] = SimpleNamespace(weight=weight, inplace_update=False)
        put(self.model, key, merged(self.patches[key], weight))

    def weight(self, key):
        weight = attrgetter(key)(self.model)
        for function in getattr(attrgetter(split(key)[0])(self.model), "weight_function", ()):
            weight = function(weight) if function.key == key else weight
        return weight


class ClassicPatcher(Patcher):
    """forge-classic undoes the last clone, from its own backup, when it loads another. No weight is fused."""

    fused = False

    def __init__(self, model):
        super().__init__(model)
        self.patches, self.backup = {}, {}

    def copy_to(self, made):
        made.patches = {key: list(patches) for key, patches in self.patches.items()}

    def add_patches(self, *, filename, patches, strength_patch):
        for key, _, value in patches:
            self.patches.setdefault(key, []).append((strength_patch, value, 1.0))

    def calculate_weight(self, patches, weight, key):
        if self.model.fail_at == key:
            raise torch.cuda.OutOfMemoryError("merge")
        return merged(patches, weight)

    def load_it(self):
        if self.model.loaded is self:
            return
        if self.model.loaded is not None:
            for key, weight in self.model.loaded.backup.items():
                put(self.model, key, weight)
            self.model.loaded.backup = {}
        self.model.loaded = self
        for key, patches in self.patches.items():
            self.backup[key] = attrgetter(key)(self.model)
            put(self.model, key, self.calculate_weight(patches, self.backup[key], key))

    def weight(self, key):
        return attrgetter(key)(self.model)


class Clip:
    def __init__(self, patcher):
        self.patcher = patcher

    def clone(self):
        return Clip(self.patcher.clone())


class Objects(SimpleNamespace):
    def shallow_copy(self):
        return Objects(unet=self.unet, clip=self.clip)


class Checkpoint(SimpleNamespace):
    """One that can be referred to weakly, as the host's."""


def checkpoint(kind):
    """A loaded checkpoint whose UNet and text encoder have patchers of a kind."""
    torch.manual_seed(0)
    models = [KModel(), KModel()]
    for model in models:
        model.loaded, model.fail_at, model.half_offloaded, model.packed = None, None, False, False
    original = Objects(unet=kind(models[0]), clip=Clip(kind(models[1])))
    return Checkpoint(
        is_sdxl=False, forge_objects_original=original, forge_objects=original.shallow_copy(),
        forge_objects_after_applying_lora=original.shallow_copy(), current_lora_hash="[]",
    )  # fmt: skip


class Networks(SimpleNamespace):
    """The host's loader: a "file" is {"unet": patches, "clip": patches}, a patch (key, offset, value)."""

    def __init__(self, files):
        super().__init__(files=files, load_lora_for_models=self.load)

    def load_lora_state_dict(self, filename):
        return self.files[filename]

    def load(
        self, model, clip, tensors, strength_model, strength_clip, filename="default", online_mode=False
    ):
        made, text = model.clone(), clip.clone()
        more = {"online_mode": online_mode} if model.fused else {}
        if not tensors.get("unet"):
            return model, clip
        made.add_patches(filename=filename, patches=tensors["unet"], strength_patch=strength_model, **more)
        text.patcher.add_patches(
            filename=filename, patches=tensors.get("clip", ()), strength_patch=strength_clip, **more
        )
        return made, text


def backend(online):
    """The modules of Forge that its adapter imports."""

    def module(name, **contents):
        made = ModuleType(name)
        made.__dict__.update(contents)
        return made

    def get_attr_with_parent(model, key):
        layer, name = attrgetter(split(key)[0])(model), split(key)[1]
        return layer, name, getattr(layer, name)

    arguments = type("Arguments", (dict,), {"online_lora": online})(online_lora=online)
    parts = {
        "args": module("backend.args", dynamic_args=arguments),
        "utils": module(
            "backend.utils",
            get_attr_with_parent=get_attr_with_parent,
            nested_move_to_device=lambda patches, **_: patches,
        ),
        "memory_management": module("backend.memory_management", signal_empty_cache=False),
    }
    return {
        "backend": module("backend", **parts),
        **{f"backend.{name}": part for name, part in parts.items()},
    }


def real_kind(folder):
    """The patcher of a forge-classic or reForge checkout in `folder`, on the CPU, with its own merge.

    Only the loading of clones is ours.
    """
    sys.path.insert(0, folder)
    args_parser = importlib.import_module("ldm_patched.modules.args_parser")
    args_parser.args.always_cpu = True
    real = importlib.import_module("ldm_patched.modules.model_patcher").ModelPatcher
    adapters = (
        importlib.import_module("ldm_patched.modules.weight_adapter")
        if hasattr(real, "patch_weight_to_device")
        else None
    )

    class RealPatcher(real):
        fused = adapters is not None

        def __init__(self, model, load_device=CPU, offload_device=CPU, *args, **more):
            super().__init__(model, load_device, offload_device, *args, **more)

        def clone(self):
            made = super().clone()
            if type(made) is not type(self):
                made.__class__ = type(self)
            return made

        add_conditioning_modifier = Patcher.add_conditioning_modifier

        def add_patches(self, *, filename, patches, strength_patch, online_mode=False):
            super().add_patches(
                {(key, offset) if offset else key: self.value(value) for key, offset, value in patches},
                strength_patch,
            )

        def value(self, value):
            kind, parts = value
            return (
                adapters.LoRAAdapter(set(), (*parts, None))
                if adapters and kind == "lora"
                else (parts if kind == "diff" else value)
            )

        def calculate_weight(self, patches, weight, key, *args, **more):
            self.fail_at(key)
            return super().calculate_weight(patches, weight, key, *args, **more)

        def patch_weight_to_device(self, key, *args, **more):
            self.fail_at(key)
            return super().patch_weight_to_device(key, *args, **more)

        def fail_at(self, key):
            if self.model.fail_at == key:
                raise torch.cuda.OutOfMemoryError("merge")

        if not fused:
            del patch_weight_to_device

        def load_it(self):
            if adapters:
                self.partially_load(self.load_device, extra_memory=1e32)
                return
            if self.model.loaded is not self:
                if self.model.loaded is not None:
                    self.model.loaded.unpatch_model(self.offload_device)
                self.model.loaded = self
                self.patch_model(self.load_device)

        def weight(self, key):
            return attrgetter(key)(self.model)

    return RealPatcher
