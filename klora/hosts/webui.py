"""The `Host` that runs, through the modules that AUTOMATIC1111 and all Forges share.

They are imported where they are used. When the host imports this extension, some of them do not exist yet,
and later the host replaces objects in them, such as the checkpoint and the options.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from klora.hosts.base import Checkpoint, Host, HostLora, Lock, PassSchedule
from klora.hosts.detect import find_adapter
from klora.hosts.lora_registry import registry
from klora.hosts.progress import scoring_progress


class WebUI:
    """`Host` for the WebUI in whose process this code runs. It has no state of its own."""

    def loras(self) -> list[HostLora]:
        import networks

        names, _ = registry(networks)
        return sorted(
            (HostLora.of(name, entry) for name, entry in names.items()), key=lambda lora: lora.name.casefold()
        )

    def refresh_loras(self) -> None:
        import networks

        networks.list_available_networks()

    def lora_of_tag(self, name: str) -> HostLora | None:
        import networks

        names, aliases = registry(networks)
        known: dict[str, Any] = names if name.lower() in networks.forbidden_network_aliases else aliases
        return HostLora.of(known[name].name, known[name]) if name in known else None

    def lora_folders(self) -> list[Path]:
        from modules import shared

        given = shared.cmd_opts
        folders = [
            getattr(given, "lora_dir", None),
            getattr(given, "lyco_dir_backcompat", None),
            *(getattr(given, "lora_dirs", None) or ()),
        ]
        return [Path(folder) for folder in folders if folder]

    def preview_of(self, lora: HostLora) -> str | None:
        from modules import ui_extra_networks

        page = next((page for page in ui_extra_networks.extra_pages if page.name == "lora"), None)
        found: str | None = page.find_preview(str(lora.path.with_suffix(""))) if page else None
        return found

    def checkpoint(self) -> Checkpoint:
        from modules import shared

        return _checkpoint(shared.sd_model)

    def checkpoint_at_rest(self) -> Checkpoint | None:
        from modules import sd_models

        data = sd_models.model_data
        info = getattr(data.sd_model, "sd_checkpoint_info", None)
        wanted = getattr(data, "forge_loading_parameters", {}).get("checkpoint_info")
        if info is None or (wanted is not None and wanted.filename != info.filename):
            return None
        return _checkpoint(data.sd_model)

    def schedule_of_pass(self, p: Any) -> PassSchedule:
        from modules.processing import StableDiffusionProcessingImg2Img
        from modules.sd_samplers_common import setup_img2img_steps

        is_hires = bool(getattr(p, "is_hr_pass", False))
        if not is_hires and not isinstance(p, StableDiffusionProcessingImg2Img):
            return PassSchedule(p.steps, 0, p.steps)
        asked = (getattr(p, "hr_second_pass_steps", 0) or p.steps) if is_hires else None
        steps, last = setup_img2img_steps(p, asked)
        runs = last + 1
        return PassSchedule(max(steps, runs), max(steps - runs, 0), runs)

    def tag_words(self) -> list[str]:
        """A1111 also accepts <lyco:…>."""
        from modules.extra_networks import extra_network_aliases, extra_network_registry

        lora = extra_network_registry.get("lora")
        return ["lora", *(alias for alias, network in extra_network_aliases.items() if network is lora)]

    def tag(self, name: str, weight: float) -> Any:
        from modules.extra_networks import ExtraNetworkParams

        params = ExtraNetworkParams(items=[name, str(weight)])
        params.positional, params.named = [name, str(weight)], {}
        return params

    def activate(self, p: Any, tags: Any) -> None:
        from modules import extra_networks

        extra_networks.activate(p, tags)

    def queue_lock(self) -> Lock:
        from modules.call_queue import queue_lock

        lock: Lock = queue_lock
        return lock

    def is_awaited(self) -> bool:
        return bool(getattr(self.queue_lock(), "_pending_threads", ()))

    def is_generating(self) -> bool:
        from modules import shared

        return bool(shared.state.job)

    def is_interrupted(self) -> bool:
        from modules import shared

        return bool(shared.state.interrupted or shared.state.stopping_generation)

    def scoring_progress(self) -> AbstractContextManager[Callable[[int, int], None]]:
        from modules import shared

        return scoring_progress(shared.state)

    def device(self) -> torch.device:
        from modules import devices

        return torch.device(devices.device)

    def option(self, name: str, default: Any) -> Any:
        from modules import shared

        return getattr(shared.opts, name, default)

    def set_option(self, name: str, value: Any) -> None:
        from modules import shared

        setattr(shared.opts, name, value)

    def api_credentials(self) -> dict[str, str]:
        from modules import shared

        pairs = (shared.cmd_opts.api_auth or "").split(",")
        return {user: password for user, colon, password in (pair.partition(":") for pair in pairs) if colon}

    def report(self, message: str) -> None:
        from modules import errors

        errors.report(message, exc_info=True)


HOST: Host = WebUI()
"""The host that K-LoRA's hooks, routes and controls are given."""


def _checkpoint(model: Any) -> Checkpoint:
    import networks

    info = getattr(model, "sd_checkpoint_info", None)
    return Checkpoint(
        model,
        getattr(info, "filename", None),
        getattr(info, "name_for_extra", ""),
        find_adapter(networks, model),
    )
