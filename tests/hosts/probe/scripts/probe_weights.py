"""For the tests against a running WebUI of any kind: every weight of the denoiser at every evaluation.

GET /klora-probe/v1/weights answers a list with one entry for each evaluation since the last GET: {layer:
[checksum of each stacked piece]}. The weights are those that the forward pass uses, whether merged or changed
on the fly.
"""

import zlib

import torch
from modules import script_callbacks, shared

calls = []


def denoiser():
    objects = getattr(shared.sd_model, "forge_objects", None)
    return objects.unet.model.diffusion_model if objects else shared.sd_model.model.diffusion_model


def stored(weight):
    if getattr(weight, "gguf_cls", None) is None:
        return weight.detach()
    from backend.operations_gguf import dequantize_tensor

    return dequantize_tensor(weight)


def effective(layer):
    """The weight after what the host adds to it in every forward pass."""
    weight = stored(layer.weight)
    if patches := getattr(layer, "forge_online_loras", {}).get("weight"):
        from backend.patcher.lora import merge_lora_to_weight

        return merge_lora_to_weight(patches, weight.to(torch.float32), computation_dtype=torch.float32)
    for function in getattr(layer, "weight_function", ()):
        weight = function(weight.to(torch.float32, copy=True))
    return weight


def heights(name, weight):
    """Of the pieces of a weight: q is as high as the model is wide, k and v are alike."""
    rows, width = weight.shape[:2]
    if name.endswith(".qkv"):
        return [width, (rows - width) // 2, (rows - width) // 2]
    return [width, width, width, rows - 3 * width] if name.endswith(".linear1") else [rows]


def checksums(name, weight):
    pieces = weight.contiguous().view(torch.uint8).reshape(len(weight), -1).split(heights(name, weight))
    return [zlib.crc32(piece.numpy().tobytes()) for piece in pieces]


@torch.inference_mode()
def on_cfg_after_cfg(_params):
    layers = {
        name: layer
        for name, layer in denoiser().named_modules()
        if getattr(layer, "weight", None) is not None and layer.weight.dim() > 1
    }
    calls.append({name: checksums(name, effective(layer)) for name, layer in layers.items()})


def on_app_started(_demo, app):
    def weights():
        answer = list(calls)
        calls.clear()
        return answer

    app.add_api_route("/klora-probe/v1/weights", weights, methods=["GET"])


script_callbacks.on_cfg_after_cfg(on_cfg_after_cfg)
script_callbacks.on_app_started(on_app_started)
