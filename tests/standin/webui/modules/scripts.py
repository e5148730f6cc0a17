"""Scripts: loaded from files, asked for their controls, and called in turn.

An exception in a hook is printed, and the host goes on.
"""

import importlib.util
from collections import namedtuple

from modules.errors import reported

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", "script_class path basedir module")
HOOKS = (
    "before_process", "process", "before_process_batch", "after_extra_networks_activate", "process_batch",
    "before_hr",
    "process_before_every_sampling", "post_sample", "postprocess_batch", "postprocess",
)  # fmt: skip

scripts_data = []


class Script:
    args_from = args_to = None
    infotext_fields = None
    paste_field_names = None

    def title(self):
        raise NotImplementedError

    def ui(self, is_img2img):
        return []

    def show(self, is_img2img):
        return True


def load(path):
    spec = importlib.util.spec_from_file_location(path.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Script) and value is not Script
    ]
    scripts_data.extend(
        ScriptClassData(script_class, str(path), str(path.parents[1]), module) for script_class in found
    )


class ScriptRunner:
    """The scripts of one tab.

    Their controls are the positions of `script_args`, the first of which chooses a selectable script.
    """

    def __init__(self, is_img2img):
        self.is_img2img = is_img2img
        made = [(data.script_class(), data.path) for data in scripts_data]
        shown = [(script, path, script.show(is_img2img)) for script, path in made]
        self.alwayson_scripts = [script for script, _, visible in shown if visible is AlwaysVisible]
        self.selectable_scripts = [
            script for script, _, visible in shown if visible and visible is not AlwaysVisible
        ]
        self.scripts = [*self.alwayson_scripts, *self.selectable_scripts]
        self.inputs = [None]
        for script in self.scripts:
            script.args_from = len(self.inputs)
            self.inputs += script.ui(is_img2img) or []
            script.args_to = len(self.inputs)
        self.infotext_fields = [field for script in self.scripts for field in script.infotext_fields or ()]
        self.default_args = [0, *(None for _ in self.inputs[1:])]
        for script in self.scripts:
            self.default_args[script.args_from : script.args_to] = [
                component.value for component in script.ui(is_img2img) or []
            ]

    def named(self, title):
        return next((script for script in self.scripts if script.title().lower() == title.lower()), None)

    def info(self):
        return [
            {
                "name": script.title().lower(), "is_alwayson": script in self.alwayson_scripts,
                "is_img2img": self.is_img2img,
                "args": [{"label": c.label, "value": c.value, "choices": getattr(c, "choices", None)}
                         for c in self.inputs[script.args_from:script.args_to]],
            }
            for script in self.scripts
        ]  # fmt: skip

    def run(self, p):
        """What the chosen script returns, None if none is chosen or it leaves the work to the host."""
        if not p.script_args[0]:
            return None
        script = self.selectable_scripts[p.script_args[0] - 1]
        return script.run(p, *p.script_args[script.args_from : script.args_to])


def _hook(name):
    def call(self, p, *args, **kwargs):
        for script in self.alwayson_scripts:
            if hasattr(script, name):
                with reported(f"{name} of {script.title()}"):
                    getattr(script, name)(
                        p, *args, *p.script_args[script.args_from : script.args_to], **kwargs
                    )

    return call


for _name in HOOKS:
    setattr(ScriptRunner, _name, _hook(_name))
