"""For the tests against a running WebUI of any kind.

GET /klora-probe/v1/tensors answers {"count", "bytes"} of the tensors that are alive.
"""

import gc

import torch
from modules import script_callbacks


def tensors():
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in alive
        if tensor.layout == torch.strided
    }
    return {"count": len(alive), "bytes": sum(storages.values())}


script_callbacks.on_app_started(
    lambda _demo, app: app.add_api_route("/klora-probe/v1/tensors", tensors, methods=["GET"])
)
