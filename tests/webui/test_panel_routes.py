"""What the panel asks for: the card of the chosen files and the pair's scores, by the names in the host."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from webui_host import NetworkOnDisk, module

from klora.analysis import analyze
from klora.core import scores as scored
from klora.core.blocks import block_of, forward_order
from klora.core.changes import as_changes
from klora.core.lora_file import read_lora
from klora.core.methods import LARGEST, METHODS
from klora.errors import HostError
from klora.hosts.webui import HOST
from klora.settings import Settings
from klora.webui import panel_routes, paths, preflight

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PAIR = GOLDEN / "sdxl_layers_missing"
NAMES = {"subject": "subject", "style": "style"}


def model(base="sdxl", name="tiny", filename="/models/tiny.safetensors", higher=()):
    """A checkpoint whose layers have the pair's sizes; those in `higher` are twice as high."""
    shapes = {
        layer: (rows * (2 if layer in higher else 1), columns)
        for role in NAMES
        for layer, (rows, columns) in layers_of(role)
    }
    modules = {
        layer: SimpleNamespace(weight=torch.empty(shape, device="meta")) for layer, shape in shapes.items()
    }
    denoiser = SimpleNamespace(named_modules=modules.items)
    return SimpleNamespace(
        is_sdxl=base == "sdxl", is_sd2=base == "sd2", model=SimpleNamespace(diffusion_model=denoiser),
        sd_checkpoint_info=SimpleNamespace(name_for_extra=name, filename=filename),
    )  # fmt: skip


def layers_of(role):
    return [(name, info.shape) for name, info in read_lora(PAIR / f"{role}.safetensors").layers.items()]


@pytest.fixture(autouse=True)
def host(networks, shared, monkeypatch, tmp_path):
    """A host with the pair, a FLUX LoRA, a file that is not a LoRA, and an SDXL checkpoint."""
    monkeypatch.setattr(paths, "cache_folder", lambda: tmp_path / "scores")
    (tmp_path / "broken.safetensors").write_bytes(b"not a LoRA")
    flux = NetworkOnDisk("flux")
    flux.filename = str(GOLDEN / "flux_fused_split" / "style.safetensors")
    networks.put(
        NetworkOnDisk("subject", folder=PAIR),
        NetworkOnDisk("style", folder=PAIR),
        NetworkOnDisk("broken", folder=tmp_path),
        flux,
    )
    networks.network_apply_weights = networks.network_restore_weights_from_backup = None
    page = SimpleNamespace(name="lora", find_preview=lambda path: f"./thumb?filename={path}.png")
    made = SimpleNamespace(
        networks=networks, shared=shared,
        models=module("modules.sd_models", model_data=SimpleNamespace(sd_model=model())),
        extra=module("modules.ui_extra_networks", extra_pages=[SimpleNamespace(name="checkpoints"), page]),
    )  # fmt: skip
    shared.state = SimpleNamespace(job="")
    for name, its in (("sd_models", made.models), ("ui_extra_networks", made.extra)):
        monkeypatch.setitem(sys.modules, f"modules.{name}", its)
        setattr(sys.modules["modules"], name, its)
    return made


def client():
    app = FastAPI()
    panel_routes.register(app)
    return TestClient(app)


def the_card(**names):
    answer = client().post("/klora/internal/card", json=names)
    assert answer.status_code == 200
    return answer.json()


def test_the_card_says_what_the_files_are():
    found = the_card(**NAMES)
    subject = found["subject"]
    assert (subject["name"], subject["base"], subject["dialect"], subject["kinds"]) == (
        "subject",
        "SDXL",
        "kohya",
        "LoRA",
    )
    assert subject["preview"] == f"./thumb?filename={PAIR / 'subject'}.png"
    assert found["style"]["dialect"] == "raw PEFT"
    assert found["problems"] == []
    assert found["checkpoint"] == {"name": "tiny", "base": "SDXL"}


def test_the_card_counts_the_layers_as_the_plan_does():
    plan = analyze(PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings(), steps=1).plan
    only = [layer.only for layer in plan.scores.layers]
    assert the_card(**NAMES)["layers"] == {
        "shared": only.count(None),
        "subject": only.count("subject"),
        "style": only.count("style"),
    }


def test_nothing_is_read_until_a_lora_is_chosen(monkeypatch):
    monkeypatch.setattr(preflight.loras, "read", lambda path: pytest.fail(f"read {path}"))
    found = the_card(subject="", style="")
    assert (found["subject"], found["style"], found["layers"]) == (None, None, None)


def test_one_file_has_its_card_before_the_other_is_chosen():
    found = the_card(subject="subject", style="")
    assert found["subject"]["layers"] > 0
    assert (found["style"], found["layers"], found["problems"]) == (None, None, [])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({**NAMES, "style": "subject"}, "the same LoRA"),
        ({**NAMES, "style": "flux"}, "made for SDXL but the style LoRA style.safetensors for FLUX"),
        (
            {"subject": "flux"},
            "style.safetensors is for FLUX and the loaded checkpoint is SDXL: load a checkpoint of FLUX",
        ),
    ],
)
def test_the_card_says_what_generate_would_refuse(names, said):
    assert said in " ".join(the_card(**names)["problems"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "broken.safetensors"), ("sbject", "nearest: 'subject'"), ("/etc/passwd", "lists no LoRA")],
)
def test_a_file_that_cannot_be_used_has_its_sentence_and_the_other_its_card(name, said):
    found = the_card(subject=name, style="style")
    assert said in found["subject"]["problem"]
    assert found["style"]["base"] == "SDXL"


def test_a_checkpoint_that_nobody_listed_is_known_by_its_hosts_names(host):
    host.models.model_data.sd_model = model(base="sd2")
    found = the_card(subject="subject")
    known_as = "Stable Diffusion 2.x (listed by the WebUI's own names)"
    assert found["checkpoint"]["base"] == found["subject"]["base"] == known_as
    assert found["problems"] == []


def test_a_webui_that_does_not_tell_the_names_of_such_a_checkpoint_gets_a_sentence(host, monkeypatch):
    def cannot_tell(*_):
        raise HostError("The WebUI gives no list of its layers: load another checkpoint.")

    monkeypatch.setattr("klora.hosts.a1111.A1111.family_of", cannot_tell)
    found = the_card(subject="subject")
    assert found["subject"]["base"] == "SDXL"
    assert found["problems"] == ["The WebUI gives no list of its layers: load another checkpoint."]


def test_a_lora_that_such_a_checkpoint_does_not_know_gets_a_sentence(host):
    host.models.model_data.sd_model = model(base="sd2")
    assert the_card(style="style")["problems"] == [
        "The LoRA style.safetensors is for SDXL and the loaded checkpoint is Stable Diffusion 2.x: load a "
        "checkpoint of SDXL, or choose LoRAs made for this one."
    ]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("flux_fused_split", "For FLUX the paper's authors recommend the schedule S*."),
        (
            "z_image_fused_musubi",
            "Z-Image is a flow-matching model like FLUX, for which the paper's authors recommend the "
            "schedule S*.",
        ),
        ("sdxl_layers_missing", ""),
    ],
)
def test_the_card_says_why_it_offers_s_star(networks, pair, said):
    file = NetworkOnDisk("another")
    file.filename = str(GOLDEN / pair / "subject.safetensors")
    networks.put(file)
    assert the_card(subject="another")["subject"]["advice"] == said


def test_a_pair_that_does_not_fit_the_checkpoint_gets_a_sentence(host):
    layer, (rows, columns) = layers_of("style")[-1]
    host.models.model_data.sd_model = model(higher=[layer])
    found = the_card(style="style")
    assert found["checkpoint"]["base"] == "SDXL"
    assert f"{layer} is {rows} × {columns} and there it is {2 * rows} × {columns}" in found["problems"][0]


@pytest.mark.parametrize(
    "data",
    [
        SimpleNamespace(sd_model=None),
        SimpleNamespace(sd_model=SimpleNamespace()),
        SimpleNamespace(
            sd_model=model("sd2"),
            forge_loading_parameters={
                "checkpoint_info": SimpleNamespace(filename="/models/next.safetensors")
            },
        ),
    ],
)
def test_before_the_checkpoint_is_loaded_no_other_is_compared_with(host, data):
    host.models.model_data = data
    found = the_card(**NAMES)
    assert (found["checkpoint"], found["problems"]) == (None, [])


def test_an_unknown_webui_gets_a_sentence(host):
    del host.networks.network_apply_weights
    assert "does not know this WebUI" in the_card(**NAMES)["problems"][0]


def test_the_users_own_trigger_words_come_before_the_files(host, tmp_path):
    save_file(
        load_file(PAIR / "style.safetensors"),
        tmp_path / "ink.safetensors",
        metadata={"modelspec.trigger_phrase": "in ink, wash"},
    )
    (tmp_path / "ink.json").write_text(json.dumps({"activation text": "my ink words, in ink"}))
    host.networks.put(*host.networks.on_disk, NetworkOnDisk("ink", folder=tmp_path))
    assert the_card(style="ink")["style"]["words"] == ["my ink words", "in ink", "wash"]


def scores(**more):
    return client().post("/klora/internal/scores", json={**NAMES, **more})


@pytest.mark.parametrize("k_scale", [1.0, 0.5])
def test_scores_are_the_plans_in_its_order_with_places_in_the_network(k_scale):
    found = scores(k_scale=k_scale).json()
    analysis = analyze(
        PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings(k_scale=k_scale), steps=3
    )
    layers = analysis.plan.scores.layers
    assert found["gamma"] == analysis.plan.gamma
    assert found["warnings"] == analysis.warnings
    for field in ("name", "only", "k"):
        assert found["layers"][field] == [getattr(layer, field) for layer in layers]
    for field, of in found["magnitudes"].items():
        for role in preflight.ROLES:
            assert of[role] == [getattr(layer, f"{role}_{field}") for layer in layers]
        both = [i for i, layer in enumerate(layers) if layer.only is None]
        assert [of["ratio"][i] for i in both] == [of["subject"][i] / of["style"][i] for i in both]
        assert all(abs(of["ratio"][i]) == LARGEST for i in range(len(layers)) if i not in both)
    names = found["layers"]["name"]
    assert sorted(names, key=lambda name: found["layers"]["place"][names.index(name)]) == sorted(
        names, key=forward_order
    )
    assert found["layers"]["block"] == [block_of(name) for name in names]


WRONG = [
    ({"style": "flux"}, "for FLUX"), ({"k_scale": "x"}, "'k_scale' (K scale)"),
    ({"style": ""}, "No style LoRA"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "said"), WRONG)
def test_a_pair_that_cannot_be_scored_gets_its_sentence(more, said):
    answer = scores(**more).json()
    assert said in answer["problem"]
    assert not answer["again"]


def strengths(**more):
    return client().post("/klora/internal/strengths", json={**NAMES, "steps": 6, "seed": 0, **more})


@pytest.mark.parametrize("method", METHODS)
def test_strengths_are_the_plans(method):
    more = {"schedule": "s*", "alpha": 2, "beta": 0.3, "gamma": 0.7, "k_scale": 0.5, "method": method}
    plan = analyze(
        PAIR / "subject.safetensors", PAIR / "style.safetensors", Settings.parse(more), steps=9, seed=5
    ).plan
    assert strengths(**more, steps=9, seed=5).json() == as_changes(plan.strengths)


@pytest.mark.parametrize(("more", "said"), [
    *WRONG, ({"method": "none"}, "'method' (Method) cannot be"),
    ({"steps": 0}, "'steps' must be a whole number from 1"), ({"seed": "x"}, "'seed' must be a whole number"),
])  # fmt: skip
def test_strengths_that_cannot_be_computed_get_their_sentence(more, said):
    answer = strengths(**more).json()
    assert said in answer["problem"]
    assert not answer["again"]


def test_while_an_image_is_made_only_known_scores_are_answered(host):
    host.shared.state.job = "txt2img"
    put_off = scores().json()
    assert ("nothing else to do" in put_off["problem"], put_off["again"]) == (True, True)
    host.shared.state.job = ""
    known = scores().json()
    host.shared.state.job = "txt2img"
    assert scores().json() == known


def test_while_anybody_uses_the_machine_scoring_is_put_off(queue_lock):
    with queue_lock:
        assert scores().json()["again"]
    assert "gamma" in scores().json()


def test_scoring_stops_when_anybody_waits_for_the_machine(queue_lock, monkeypatch):
    generating, real = threading.Thread(target=queue_lock.acquire), scored.over_layers

    def slow(*args, **kwargs):
        generating.start()
        while not HOST.is_awaited():
            time.sleep(0.01)
        return real(*args, **kwargs)

    monkeypatch.setattr(scored, "over_layers", slow)
    assert scores().json()["again"]
    generating.join(20)
    assert not generating.is_alive()
    assert not queue_lock.acquire(blocking=False)


def test_the_log_in_of_the_page_guards_the_routes():
    app = FastAPI()
    app.auth, app.tokens = {"ann": "secret"}, {"token of ann": "ann"}
    panel_routes.register(app)
    asked = TestClient(app)
    assert asked.post("/klora/internal/card", json=NAMES).status_code == 401
    asked.cookies.set("access-token-unsecure-x", "made up")
    assert asked.post("/klora/internal/scores", json=NAMES).status_code == 401
    asked.cookies.set("access-token-unsecure-x", "token of ann")
    assert asked.post("/klora/internal/card", json=NAMES).status_code == 200


def test_the_placeholder_gives_the_page_the_declarations():
    assert "&quot;" in preflight.placeholder()
    found = preflight.constants()
    assert found["defaults"].keys() == Settings.__dataclass_fields__.keys()
    assert found["infotext"]["method"] == ("K-LoRA method", "K-LoRA selector")
    assert found["seeded"] == ["Random"]
    assert (found["defaults"]["beta"], found["schedules"], found["alphaM"]) == (
        "auto",
        {"s": 0.5, "s*": 1.3},
        1.5,
    )
