"""For the tests against a running A1111: tells which networks every layer really has, after every evaluation of the denoiser.

Link the folder above into the WebUI's extensions before starting it. GET /klora-probe/v1/applied answers
{"calls": [{layer: [network names]}, ...], "applies": number of layers rewritten} since the last GET.
"""

import networks
from modules import script_callbacks, shared

calls = []
counted = {"applies": 0}
original = networks.network_restore_weights_from_backup


def counting(module):
    counted["applies"] += 1
    return original(module)


def on_cfg_denoised(_params):
    names = {}
    for layer, module in shared.sd_model.network_layer_mapping.items():
        if layer.startswith("diffusion_model_") and hasattr(module, "network_current_names"):
            names[layer] = [entry[0] for entry in module.network_current_names]
    calls.append(names)


def on_app_started(_demo, app):
    def applied():
        answer = {"calls": list(calls), "applies": counted["applies"]}
        calls.clear()
        counted["applies"] = 0
        return answer

    app.add_api_route("/klora-probe/v1/applied", applied, methods=["GET"])


networks.network_restore_weights_from_backup = counting
script_callbacks.on_script_unloaded(lambda: setattr(networks, "network_restore_weights_from_backup", original))
script_callbacks.on_cfg_denoised(on_cfg_denoised)
script_callbacks.on_app_started(on_app_started)
