"""The stand-ins in place of the host's modules."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from standin.webui.modules.call_queue import QueueLock
from standin.webui.modules.options import Options
from webui_host import HTML, Block, Button, Component, Dropdown, InputAccordion, Networks, Slider, module


@pytest.fixture
def networks(monkeypatch):
    made = Networks()
    monkeypatch.setitem(sys.modules, "networks", made)
    return made


@pytest.fixture
def shared(monkeypatch):
    made = module("modules.shared", cmd_opts=SimpleNamespace(api_auth=None), opts=Options({}))
    devices = module("modules.devices", device="cpu")
    call_queue = module("modules.call_queue", queue_lock=QueueLock())
    parts = {"shared": made, "devices": devices, "call_queue": call_queue}
    monkeypatch.setitem(sys.modules, "modules", module("modules", **parts))
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    return made


@pytest.fixture
def queue_lock(shared):
    """The host's own; whoever holds it has the machine."""
    return sys.modules["modules.call_queue"].queue_lock


@pytest.fixture
def ui(monkeypatch, networks, shared):
    """klora.webui.ui, imported with a stand-in for gradio and the host's components."""

    def create_refresh_button(components, refresh, arguments, elem_id):
        button = Component("🔄", elem_id=elem_id, tooltip="refresh")
        button.click(lambda: (refresh(), arguments())[1], [], components)
        return button

    gradio = module(
        "gradio", Button=Button, HTML=HTML, Row=Block, Accordion=Block, Dropdown=Dropdown, Slider=Slider
    )
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(
        sys.modules,
        "modules.ui_common",
        module("modules.ui_common", create_refresh_button=create_refresh_button),
    )
    components = module("modules.ui_components", InputAccordion=InputAccordion, ToolButton=Component)
    monkeypatch.setitem(sys.modules, "modules.ui_components", components)
    monkeypatch.delitem(sys.modules, "klora.webui.ui", raising=False)
    yield importlib.import_module("klora.webui.ui")
    del sys.modules["klora.webui.ui"]
