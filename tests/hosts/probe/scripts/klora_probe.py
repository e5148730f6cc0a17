"""For the tests against a WebUI or its stand-in: what a user of the HTTP API can neither see nor cause.

Link the folder above into the WebUI's extensions before starting it.

- POST /klora-probe/v1/fault {"place", "call", "kind", "times"}: the function at that place fails at its n-th
call
  from now on, and at the next calls if "times" is more than 1. If the kind is "interrupt", the function does
  its work and the run is interrupted. GET: {"armed": whether the fault is still to come}, and cancels it.
- GET /klora-probe/v1/counts: {place: its calls since the last GET}. - POST /klora-probe/v1/reload: like the
button "Reload UI". - GET /klora-probe/v1/started: when these scripts were loaded. - GET
/klora-probe/v1/applied, on hosts whose layers keep the names of their networks: {"calls": [{layer: [network
  names]}, ...], "applies": number of layers rewritten}, since the last GET. The calls tell which networks
  every layer really has after every evaluation of the denoiser.
- POST /klora-probe/v1/tables {"off": [keys of families]}: K-LoRA knows none of these base models, until it is
  called again.
"""

import sys
import time
from collections import Counter
from functools import wraps

import networks
import torch
from fastapi import Body
from modules import script_callbacks, shared

STARTED = time.time()
ERRORS = {"RuntimeError": RuntimeError, "OutOfMemoryError": torch.cuda.OutOfMemoryError}
LAYERS_KEEP_NAMES = not hasattr(networks, "load_lora_for_models")

calls = []
counted = Counter()
fault = {}
tables = {}
undo = []


def places():
    """{place: (owner, name) of the function there}, as far as it can be known.

    These are functions of the host, including those of the loaded checkpoint, and what K-LoRA does in each
    hook.
    """
    model, run = shared.sd_model, sys.modules["klora.webui.run"].Run
    preparation = sys.modules["klora.webui.preparation"]
    found = {
        "process": (preparation, "scored"), "networks loaded": (run, "networks_loaded"),
        "begin pass": (run, "begin_pass"), "tell": (run, "tell"),
        "text encoder": (type(model), "get_learned_conditioning"),
        "decode": (type(model), "decode_first_stage"),
        "callback": (sys.modules["klora.session"].Session, "step"),
        "warnings": (preparation, "pair_warnings"),
        "override": (sys.modules["klora.webui.processing_patches"].ProcessingPatches, "put"),
    }  # fmt: skip
    if LAYERS_KEEP_NAMES:
        import network_lora

        return {
            **found, "load": (networks, "load_network"), "apply": (networks, "network_apply_weights"),
            "restore": (networks, "network_restore_weights_from_backup"),
            "merge": (network_lora.NetworkModuleLora, "calc_updown"),
            "forward": (type(model), "apply_model"),
        }  # fmt: skip
    from backend.patcher import base, lora

    merges = base if hasattr(base, "merge_lora_to_weight") else lora
    denoiser = type(model.forge_objects.unet.model)
    return {
        **found, "load": (networks, "load_lora_for_models"), "merge": (merges, "merge_lora_to_weight"),
        "forward": (denoiser, "apply_model"),
    }  # fmt: skip


def wrap(owner, name, made, place):
    original = getattr(owner, name)
    if getattr(original, "klora_probe", None) == place:
        return
    replacement = wraps(original)(made(original))
    replacement.klora_probe = place
    setattr(owner, name, replacement)
    undo.append(lambda: setattr(owner, name, original))


def wrap_places():
    for place, (owner, name) in places().items():
        wrap(owner, name, faulty(place), place)


def faulty(place):
    def made(original):
        def call(*args, **kwargs):
            counted[place] += 1
            if fault.get("place") == place:
                happen(place)
            return original(*args, **kwargs)

        return call

    return made


def happen(place):
    fault["call"] -= 1
    if fault["call"] > 0:
        return
    fault["times"] -= 1
    if fault["times"] < 0:
        return
    kind = fault["kind"]
    if kind in ERRORS:
        raise ERRORS[kind](f"a fault of the test in {place}")
    shared.state.interrupt()


def counting_rewritten(original):
    def rewritten(module):
        counted["applies"] += getattr(module, "network_layer_name", "").startswith("diffusion_model_")
        return original(module)

    return rewritten


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
    wrap_places()
    answer = {place: count for place, count in counted.items() if place != "applies"}
    counted.clear()
    return answer


def arm(request: dict = Body(...)):  # noqa: B008
    wrap_places()
    fault.update({"times": 1, **request})


def disarm():
    answer = {"armed": fault.get("call", 0) > 0}
    fault.clear()
    return answer


def switch_tables_off(request: dict = Body(...)):  # noqa: B008
    """The order of the tables counts, so all are put back before some are taken out."""
    families = sys.modules["klora.core.families"].FAMILIES
    every = {**tables} or {**families}
    families.clear()
    families.update({key: family for key, family in every.items() if key not in request["off"]})
    tables.clear()
    if request["off"]:
        tables.update(every)


def on_app_started(_demo, app):
    app.add_api_route("/klora-probe/v1/fault", arm, methods=["POST"])
    app.add_api_route("/klora-probe/v1/fault", disarm, methods=["GET"])
    app.add_api_route("/klora-probe/v1/counts", counts, methods=["GET"])
    app.add_api_route("/klora-probe/v1/tables", switch_tables_off, methods=["POST"])
    app.add_api_route("/klora-probe/v1/reload", shared.state.request_restart, methods=["POST"])
    app.add_api_route("/klora-probe/v1/started", lambda: {"started": STARTED}, methods=["GET"])
    if LAYERS_KEEP_NAMES:
        app.add_api_route("/klora-probe/v1/applied", applied, methods=["GET"])


def on_script_unloaded():
    while undo:
        undo.pop()()


if LAYERS_KEEP_NAMES:
    wrap(networks, "network_restore_weights_from_backup", counting_rewritten, "applies")
    script_callbacks.on_cfg_denoised(on_cfg_denoised)
script_callbacks.on_script_unloaded(on_script_unloaded)
script_callbacks.on_app_started(on_app_started)
