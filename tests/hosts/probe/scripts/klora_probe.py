"""For the tests against a running A1111, or its stand-in: what a user of the HTTP API cannot see or cause.

Link the folder above into the WebUI's extensions before starting it.

- GET /klora-probe/v1/applied: {"calls": [{layer: [network names]}, ...], "applies": number of layers rewritten} since the last GET:
  which networks every layer really has, after every evaluation of the denoiser.
- POST /klora-probe/v1/fault {"place", "call", "kind"}: the host's own function at that place raises, once, at its n-th call from now.
  GET: {"armed": whether it has yet to happen}. GET /klora-probe/v1/counts: {place: its calls since the last GET}.
- POST /klora-probe/v1/reload: as the button "Reload UI". GET /klora-probe/v1/started: when these scripts were loaded.
"""

import sys
import time
from collections import Counter
from functools import wraps

import network_lora
import networks
import torch
from fastapi import Body
from modules import script_callbacks, shared

STARTED = time.time()
KINDS = {"RuntimeError": RuntimeError, "OutOfMemoryError": torch.OutOfMemoryError}

calls = []
counted = Counter()
fault = {}
undo = []


def wrap(owner, name, made):
    original = getattr(owner, name)
    replacement = wraps(original)(made(original))
    replacement.of_klora_probe = True
    setattr(owner, name, replacement)
    undo.append(lambda: setattr(owner, name, original))


def counting(original):
    def rewritten(module):
        counted["applies"] += getattr(module, "network_layer_name", "").startswith("diffusion_model_")
        return original(module)

    return rewritten


def faulty(place):
    def made(original):
        def call(*args, **kwargs):
            counted[place] += 1
            if fault.get("place") == place:
                fault["call"] -= 1
                if fault["call"] == 0:
                    kind = fault["kind"]
                    fault.clear()
                    raise KINDS[kind](f"a fault of the test in {place}")
            return original(*args, **kwargs)

        return call

    return made


def wrap_late_places():
    """Those of a checkpoint and of the K-LoRA extension can be wrapped only when these are loaded."""
    model, session = type(shared.sd_model), sys.modules["klora.session"].Session
    late = {
        "text encoder": (model, "get_learned_conditioning"), "forward": (model, "apply_model"), "decode": (model, "decode_first_stage"),
        "callback": (session, "step"),
    }  # fmt: skip
    for place, (owner, name) in late.items():
        if not hasattr(getattr(owner, name), "of_klora_probe"):
            wrap(owner, name, faulty(place))


def on_cfg_denoised(_params):
    names = {}
    for layer, module in shared.sd_model.network_layer_mapping.items():
        if layer.startswith("diffusion_model_") and hasattr(module, "network_current_names"):
            names[layer] = [entry[0] for entry in module.network_current_names]
    calls.append(names)


def applied():
    answer = {"calls": list(calls), "applies": counted.pop("applies", 0)}
    calls.clear()
    return answer


def counts():
    wrap_late_places()
    answer = {place: count for place, count in counted.items() if place != "applies"}
    counted.clear()
    return answer


def arm(request: dict = Body(...)):  # noqa: B008
    wrap_late_places()
    fault.update(request)


def on_app_started(_demo, app):
    app.add_api_route("/klora-probe/v1/applied", applied, methods=["GET"])
    app.add_api_route("/klora-probe/v1/fault", arm, methods=["POST"])
    app.add_api_route("/klora-probe/v1/fault", lambda: {"armed": bool(fault)}, methods=["GET"])
    app.add_api_route("/klora-probe/v1/counts", counts, methods=["GET"])
    app.add_api_route("/klora-probe/v1/reload", shared.state.request_restart, methods=["POST"])
    app.add_api_route("/klora-probe/v1/started", lambda: {"started": STARTED}, methods=["GET"])


def on_script_unloaded():
    while undo:
        undo.pop()()


wrap(networks, "network_restore_weights_from_backup", counting)
wrap(networks, "network_restore_weights_from_backup", faulty("restore"))
wrap(networks, "network_apply_weights", faulty("apply"))
wrap(networks, "load_network", faulty("load"))
wrap(network_lora.NetworkModuleLora, "calc_updown", faulty("merge"))
script_callbacks.on_script_unloaded(on_script_unloaded)
script_callbacks.on_cfg_denoised(on_cfg_denoised)
script_callbacks.on_app_started(on_app_started)
