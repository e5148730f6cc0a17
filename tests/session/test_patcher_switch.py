"""The adapters of the Forge family on stand-ins for their patchers. tests/hosts has the running hosts.

KLORA_PATCHER_FOLDER=/path/to/webui adds the real patcher of a forge-classic or reForge folder, without a
running host.
"""

import gc
import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forge_family import (
    WIDTH,
    ClassicPatcher,
    ComfyPatcher,
    ForgePatcher,
    Networks,
    backend,
    checkpoint,
    real_kind,
)

from klora.core import file_state
from klora.core.blocks import leader_of
from klora.core.families.flux import FLUX
from klora.errors import HostError
from klora.hosts.base import Pair, PairLora
from klora.hosts.detect import UnknownHost, find_adapter

PROJ, QKV = (
    "diffusion_model.double_blocks.0.proj.weight",
    "diffusion_model.double_blocks.0.img_attn.qkv.weight",
)
NORM = "diffusion_model.double_blocks.0.norm.weight"
LAYERS = ["double_blocks.0.proj", *(f"double_blocks.0.img_attn.qkv:{piece}" for piece in "qkv")]
SUBJECT_ONLY, STYLE_ONLY, BOTH = (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)
KINDS = {
    "Forge": (ForgePatcher, False), "Forge packed": (ForgePatcher, False),
    "Forge online": (ForgePatcher, True), "Neo": (ComfyPatcher, False),
    "Neo online": (ComfyPatcher, True), "Neo half offloaded": (ComfyPatcher, False),
    "classic": (ClassicPatcher, False),
}  # fmt: skip
if folder := os.environ.get("KLORA_PATCHER_FOLDER"):
    KINDS["real"] = (real_kind(folder), False)


def low_rank(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        "lora",
        (
            torch.randn(rows, 2, generator=generator),
            torch.randn(2, WIDTH, generator=generator),
            None,
            None,
            None,
        ),
    )


def delta(value):
    return value[1][0] @ value[1][1]


SUBJECT = {
    PROJ: low_rank(WIDTH, 1),
    QKV: low_rank(3 * WIDTH, 2),
    NORM: ("diff", (torch.full((WIDTH,), 0.5),)),
}
STYLE = {PROJ: low_rank(WIDTH, 3), QKV: {piece: low_rank(WIDTH, 4 + i) for i, piece in enumerate("qkv")}}


def patches(values):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, (0, i * WIDTH, WIDTH), piece) for i, piece in enumerate(value.values()))
        else:
            yield key, None, value


def pair_lora(role, weight=1.0, dialect="kohya"):
    shapes = {layer: SimpleNamespace(shape=(WIDTH, WIDTH)) for layer in LAYERS}
    file = SimpleNamespace(
        path=Path(f"/loras/{role}"), dialects={dialect}, scale_from_metadata=False, unused_keys=(),
        modules=(), family=FLUX, layers=shapes,
    )  # fmt: skip
    return PairLora(role, role, file, weight, True)


class Host:
    """A host of a kind with the pair chosen, and one more LoRA of the prompt loaded."""

    def __init__(self, name, monkeypatch, weight=1.0):
        kind, self.online = KINDS[name]
        for path, module in backend(self.online).items():
            monkeypatch.setitem(sys.modules, path, module)
        self.model = checkpoint(kind)
        unet = self.model.forge_objects_original.unet.model
        unet.half_offloaded, unet.packed = name == "Neo half offloaded", name == "Forge packed"
        unet.storage_dtype = torch.float8_e4m3fn if self.online else torch.float32
        self.fused = kind.fused
        known = (PROJ, QKV) if self.fused else (PROJ,)
        files = {
            f"/loras/{role}": {
                "unet": [patch for patch in patches(values) if patch[0] in (*known, NORM)],
                "clip": [(PROJ, None, values[PROJ])],
            }
            for role, values in (("subject", SUBJECT), ("style", STYLE))
        }
        self.networks = Networks({**files, "/loras/other": {"unet": [(PROJ, None, low_rank(WIDTH, 9))]}})
        self.layers = LAYERS if self.fused else LAYERS[:1]
        self.pair = Pair(
            (pair_lora("subject", weight), pair_lora("style", weight)),
            self.layers,
            ["double_blocks.0.norm"],
            lambda file: file.path,
        )
        self.original = {key: self.weight(key).clone() for key in (PROJ, QKV, NORM)}
        self.new_run()

    def new_run(self):
        self.switch = find_adapter(self.networks, self.model).switch(self.model, self.pair)

    def weight(self, key):
        return self.model.forge_objects.unet.weight(key)

    def added(self, key):
        return self.weight(key) - self.original[key]

    def activate(self):
        """As the host before its hook for loaded networks: it loads all of them again if the hash differs."""
        if self.model.current_lora_hash != "[]":
            self.model.current_lora_hash = "[]"
            self.model.forge_objects_after_applying_lora = self.model.forge_objects_original.shallow_copy()
        self.model.forge_objects = self.model.forge_objects_after_applying_lora.shallow_copy()

    def begin(self, **strengths):
        self.activate()
        self.switch.networks_loaded()
        self.model.forge_objects = self.model.forge_objects_after_applying_lora.shallow_copy()
        self.switch.attach()
        self.switch.apply(self.on_layers(**strengths))
        self.model.forge_objects.unet.load_it()

    def on_layers(self, proj=SUBJECT_ONLY, q=SUBJECT_ONLY, k=SUBJECT_ONLY, v=SUBJECT_ONLY):
        return dict(zip(self.layers, (proj, q, k, v), strict=False))

    def tagged(self, weights):
        """The host's own loading of both files, as by the tags of a prompt; a tag of weight 0 is none."""
        self.activate()
        for role, weight in zip(("subject", "style"), weights, strict=True):
            if weight:
                online = {"online_mode": True} if self.online else {}
                path = f"/loras/{role}"
                objects = self.model.forge_objects
                objects.unet, objects.clip = self.networks.load_lora_for_models(
                    objects.unet,
                    objects.clip,
                    self.networks.files[path],
                    weight,
                    weight,
                    filename=path,
                    **online,
                )
        self.model.forge_objects.unet.load_it()

    def plain(self):
        self.activate()
        self.model.forge_objects.unet.load_it()
        return {key: self.weight(key) for key in self.original}


@pytest.fixture(params=KINDS)
def host(request, monkeypatch):
    return Host(request.param, monkeypatch)


def close(a, b):
    return torch.allclose(a, b, atol=1e-6)


def test_every_layer_starts_with_its_strengths_and_a_norm_follows_its_leader(host):
    host.begin(proj=SUBJECT_ONLY)
    assert close(host.added(PROJ), delta(SUBJECT[PROJ]))
    assert close(host.added(NORM), torch.full((WIDTH,), 0.5))
    host.switch.apply({LAYERS[0]: STYLE_ONLY})
    assert close(host.added(PROJ), delta(STYLE[PROJ]))
    leader = leader_of("double_blocks.0.norm", host.layers)
    host.switch.apply({leader: STYLE_ONLY})
    assert close(host.added(NORM), torch.zeros(WIDTH))
    host.switch.apply({LAYERS[0]: BOTH})
    assert close(host.added(PROJ), delta(SUBJECT[PROJ]) + delta(STYLE[PROJ]))


def test_rows_of_a_fused_weight_come_from_a_fused_and_a_split_file(host):
    if not host.fused:
        pytest.skip("forge-classic has no FLUX")
    host.begin(q=STYLE_ONLY, k=SUBJECT_ONLY, v=BOTH)
    for _ in range(2):
        q, k, v = host.added(QKV).split(WIDTH)
        own = delta(SUBJECT[QKV]).split(WIDTH)
        assert close(q, delta(STYLE[QKV]["q"]))
        assert close(k, own[1])
        assert close(v, own[2] + delta(STYLE[QKV]["v"]))
        host.switch.apply({LAYERS[1]: STYLE_ONLY, LAYERS[2]: SUBJECT_ONLY})
    host.switch.apply(dict.fromkeys(LAYERS[1:], SUBJECT_ONLY))
    assert close(host.added(QKV), delta(SUBJECT[QKV]))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "strengths", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.5, 0.0), (0.0, 0.5), (0.0, 0.0)]
)
def test_a_layer_is_bit_for_bit_what_the_hosts_own_tags_make_of_it_at_these_strengths(
    name, strengths, monkeypatch
):
    """The host's own loader is given both files at the user's multiplier times the strength."""
    weight, expected = 0.7, Host(name, monkeypatch)
    expected.tagged([weight * strength for strength in strengths])
    host = Host(name, monkeypatch, weight)
    host.begin()
    host.switch.apply(dict.fromkeys(host.layers, strengths))
    assert all(torch.equal(host.weight(key), expected.weight(key)) for key in (PROJ, QKV, NORM))
    host.begin(**dict.fromkeys(("proj", "q", "k", "v"), strengths))
    assert all(torch.equal(host.weight(key), expected.weight(key)) for key in (PROJ, QKV, NORM))


def test_rows_of_a_fused_weight_have_strengths_of_their_own(host):
    if not host.fused:
        pytest.skip("forge-classic has no FLUX")
    host.begin(q=(0.5, 1.0), k=(1.0, 0.0), v=(0.0, 0.5))
    q, k, v = host.added(QKV).split(WIDTH)
    own = delta(SUBJECT[QKV]).split(WIDTH)
    assert close(q, own[0] / 2 + delta(STYLE[QKV]["q"]))
    assert close(k, own[1])
    assert close(v, delta(STYLE[QKV]["v"]) / 2)


def test_a_norm_has_the_strengths_of_its_leader(host):
    host.begin()
    host.switch.apply({leader_of("double_blocks.0.norm", host.layers): (0.5, 1.0)})
    assert close(host.added(NORM), torch.full((WIDTH,), 0.25))


def test_what_runs_next_finds_the_original_weights(host):
    host.begin(proj=STYLE_ONLY)
    host.switch.apply({LAYERS[0]: SUBJECT_ONLY})
    host.switch.detach()
    host.switch.detach()
    assert all(torch.equal(weight, host.original[key]) for key, weight in host.plain().items())


def test_the_next_pass_starts_with_its_own_strengths(host):
    host.begin(proj=SUBJECT_ONLY)
    host.switch.apply({LAYERS[0]: STYLE_ONLY})
    host.begin(proj=SUBJECT_ONLY)
    assert close(host.added(PROJ), delta(SUBJECT[PROJ]))


@pytest.mark.parametrize("where", ["loading", "switching"])
def test_what_runs_after_a_merge_that_died_finds_the_original_weights(host, where):
    if host.online:
        pytest.skip("nothing is merged in online mode")
    unet = host.model.forge_objects_original.unet.model
    host.plain()
    if where == "loading":
        unet.fail_at = NORM
        with pytest.raises(torch.cuda.OutOfMemoryError):
            host.begin()
    else:
        host.begin(proj=STYLE_ONLY)
        unet.fail_at = PROJ
        with pytest.raises(torch.cuda.OutOfMemoryError):
            host.switch.apply({LAYERS[0]: SUBJECT_ONLY})
    unet.fail_at = None
    if where == "loading" and isinstance(host.model.forge_objects.unet, ComfyPatcher):
        host.model.forge_objects.unet.model.current_weight_patches_uuid = None
    assert all(torch.equal(weight, host.original[key]) for key, weight in host.plain().items())


def test_the_text_encoder_gets_the_loras_that_are_to_be_on_it(host):
    host.begin()
    host.model.forge_objects.clip.patcher.load_it()
    original = host.model.forge_objects_original.clip.patcher
    both = host.model.forge_objects.clip.patcher.weight(PROJ)
    original.load_it()
    assert close(both - original.weight(PROJ), delta(SUBJECT[PROJ]) + delta(STYLE[PROJ]))


def test_after_expiring_the_host_loads_the_loras_of_the_same_prompt_again(host):
    host.activate()
    before = host.model.forge_objects_after_applying_lora
    host.activate()
    assert host.model.forge_objects_after_applying_lora is before
    host.switch.expire_loaded()
    host.activate()
    assert host.model.forge_objects_after_applying_lora is not before


def test_of_a_checkpoint_that_the_host_has_unloaded_there_is_nothing_to_expire(host):
    host.activate()
    del host.model
    gc.collect()
    host.switch.expire_loaded()
    with pytest.raises(HostError, match="unloaded the checkpoint"):
        host.switch.attach()


def test_telling_the_tags_makes_the_host_load_nothing(host):
    host.activate()
    before = host.model.forge_objects_after_applying_lora
    assert not host.switch.tags()
    host.activate()
    assert host.model.forge_objects_after_applying_lora is before


def test_a_fault_gets_out_at_the_next_evaluation(host):
    host.begin()
    gate = host.model.forge_objects.unet.model_options["conditioning_modifiers"][0]
    assert gate(1, 2) == (1, 2)
    host.switch.fail(ValueError("stop"))
    with pytest.raises(ValueError, match="stop"):
        gate(1, 2)


def test_a_unet_that_is_not_ours_any_more_is_an_error_and_no_silent_image(host):
    host.begin()
    host.model.forge_objects.unet = host.model.forge_objects_original.unet.clone()
    with pytest.raises(HostError, match="Another extension has replaced K-LoRA's UNet"):
        host.switch.apply({LAYERS[0]: STYLE_ONLY})


def test_another_extensions_clone_of_ours_is_switched(host):
    host.activate()
    host.switch.networks_loaded()
    host.switch.attach()
    host.switch.apply(host.on_layers())
    host.model.forge_objects.unet = host.model.forge_objects.unet.clone()
    host.model.forge_objects.unet.load_it()
    host.switch.apply({LAYERS[0]: STYLE_ONLY})
    assert close(host.added(PROJ), delta(STYLE[PROJ]))


def test_a_file_that_the_host_refuses_is_named(host):
    host.networks.files["/loras/style"] = {}
    with pytest.raises(HostError, match=r"did not load the style LoRA /loras/style"):
        host.begin()


@pytest.fixture
def replaceable(host, tmp_path, monkeypatch):
    """The host with a subject whose file has the content "subject" or "another".

    Its loader caches what it has read by file name.
    """
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)
    path = tmp_path / "subject"
    contents = {
        "subject": host.networks.files["/loras/subject"],
        "another": {"unet": [(PROJ, None, ANOTHER)], "clip": [(PROJ, None, ANOTHER)]},
    }
    subject, style = host.pair.loras
    file = SimpleNamespace(**{**vars(subject.file), "path": path})
    host.pair = replace(host.pair, loras=(replace(subject, file=file), style))
    host.networks.load_lora_state_dict = lru_cache(
        lambda name: contents[path.read_text()] if name == str(path) else host.networks.files[name]
    )

    def put(content):
        path.write_text(content)
        os.utime(path, (1.7e9, 1.7e9))
        host.new_run()

    host.put = put
    return host


ANOTHER = low_rank(WIDTH, 7)


def test_a_file_that_was_replaced_by_one_of_its_size_and_time_is_read_anew(replaceable):
    """Also by the text encoder, whose merge the host keeps by the names of the patches."""
    for content, expected in (("subject", SUBJECT[PROJ]), ("another", ANOTHER), ("subject", SUBJECT[PROJ])):
        replaceable.put(content)
        replaceable.begin(proj=SUBJECT_ONLY)
        assert close(replaceable.added(PROJ), delta(expected))
        clip = replaceable.model.forge_objects.clip.patcher
        clip.load_it()
        encoded = clip.weight(PROJ)
        original = replaceable.model.forge_objects_original.clip.patcher
        original.load_it()
        assert close(encoded - original.weight(PROJ), delta(expected) + delta(STYLE[PROJ]))


def test_a_file_that_has_not_changed_is_not_read_anew(replaceable):
    replaceable.put("subject")
    for _ in range(2):
        replaceable.new_run()
        replaceable.begin()
    assert replaceable.networks.load_lora_state_dict.cache_info().hits > 0


def test_an_unknown_host_says_what_was_looked_for():
    model = SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace()))
    with pytest.raises(UnknownHost, match="Looked for and not found"):
        find_adapter(SimpleNamespace(), model)


def test_nunchaku_is_refused(monkeypatch):
    host = Host("Neo", monkeypatch)
    host.model.forge_objects.unet.model.diffusion_model.loras = []
    with pytest.raises(HostError, match="Nunchaku"):
        host.new_run()
