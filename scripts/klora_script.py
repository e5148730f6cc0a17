"""The K-LoRA script: what each hook does, and what happens on errors. All else is in the package klora."""

from contextlib import contextmanager, suppress

from modules import script_callbacks, scripts

from klora.errors import Cancelled, KLoraError
from klora.hosts.webui import HOST
from klora.settings import Settings
from klora.webui import added_network, api, api_arguments, options, panel_routes, ui, xyz
from klora.webui.run import WITHOUT_THE_PAIR, fail, release, run_of, start, warn_outer_runs


class KLoraScript(scripts.Script):
    """Always-on in txt2img and img2img.

    The host catches whatever a hook raises, so each hook stops the run itself when something fails.
    """

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

    def before_process(self, p, *args):
        with suppress(KLoraError):  # process says it
            settings = parsed(p, args)
            if settings.enabled:
                added_network.take_over(p, settings, HOST)

    def process(self, p, *args):
        release(p)
        with boundary(p):
            settings = parsed(p, args)
            if settings.enabled:
                start(p, settings, HOST)

    def after_extra_networks_activate(self, p, *args, **kwargs):
        within(p, lambda run: run.networks_loaded(kwargs.get("extra_network_data")))

    def process_before_every_sampling(self, p, *args, **kwargs):
        within(p, lambda run: run.begin_pass())

    def postprocess(self, p, processed, *args):
        within(p, lambda run: run.tell(processed))
        release(p)


def parsed(p, args):
    return Settings.parse_api(args, getattr(p, "klora_xyz", {}), options.read().run_defaults())


def on_cfg_denoiser(params):
    p = getattr(params.denoiser, "p", None)
    within(p, lambda run: run.at_call(params))
    if run_of(p) is None:
        warn_outer_runs(p, WITHOUT_THE_PAIR)


def on_app_started(_demo, app):
    """Add all routes in one callback: for each one, the host inspects the whole stack, which takes 50 ms."""
    api.register(app)
    api_arguments.register(app)
    panel_routes.register(app)


def within(p, action):
    """Call `action` with the run of `p`, if it has one."""
    run = run_of(p)
    if run is not None:
        with boundary(p):
            action(run)


@contextmanager
def boundary(p):
    """Print any error, with its traceback if it is unexpected, and end the run of `p`.

    Otherwise the host would go on without K-LoRA and without a word.
    """
    try:
        yield
    except Cancelled:
        return
    except KLoraError as error:
        print(f"K-LoRA: {error}")
        fail(p, error, HOST)
    except Exception as error:  # noqa: BLE001 no error may get lost
        HOST.report(f"K-LoRA: {error}")
        fail(p, error, HOST)


options.register()
script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
script_callbacks.on_app_started(on_app_started)
