"""The K-LoRA script of the WebUIs: life cycle and error boundary; everything else is in the package klora."""

from modules import script_callbacks, scripts

from klora.errors import Cancelled
from klora.hosts.detect import UnknownHost
from klora.settings import Settings
from klora.webui import api, preview, ui, xyz
from klora.webui.generation import Run, refuse, release


class KLoraScript(scripts.Script):
    """Always-on in txt2img and img2img. Hooks run under the host's catch-all, so each stops the run itself when something fails."""

    def title(self):
        return "K-LoRA"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        xyz.register()
        controls = ui.build(is_img2img, "img2img" if is_img2img else "txt2img")
        self.infotext_fields = controls.infotext_fields
        self.paste_field_names = controls.paste_field_names
        return controls.components

    def process(self, p, *args):
        release(p)
        try:
            settings = Settings.parse_api(args, getattr(p, "klora_xyz", {}))
            if not settings.enabled:
                return
            run = Run(p, settings)
            run.prepare()
            p.klora_run = run
        except Cancelled:
            return
        except UnknownHost as error:
            print(f"K-LoRA: {error}")
            p.comment(str(error))
        except Exception as error:  # noqa: BLE001 the host would go on without K-LoRA and without a word
            tell(p, error)

    def after_extra_networks_activate(self, p, *args, **kwargs):
        within(p, lambda run: run.networks_loaded(kwargs.get("extra_network_data")))

    def process_before_every_sampling(self, p, *args, **kwargs):
        within(p, lambda run: run.begin_pass())

    def postprocess(self, p, processed, *args):
        within(p, lambda run: run.tell_warnings(processed))
        release(p)


def on_cfg_denoiser(params):
    within(getattr(params.denoiser, "p", None), lambda run: run.at_call(params))


def within(p, action):
    """Do `action` with the run of `p`, if it has one; what goes wrong stops that run."""
    run = getattr(p, "klora_run", None)
    if run is None or run.p is not p:
        return
    try:
        action(run)
    except Exception as error:  # noqa: BLE001 the host would go on without K-LoRA and without a word
        print(f"K-LoRA: {error}")
        run.fail(error)


def tell(p, error):
    print(f"K-LoRA: {error}")
    refuse(p, error)


script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
script_callbacks.on_app_started(api.register)
script_callbacks.on_app_started(preview.register)
