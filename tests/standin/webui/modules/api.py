"""The host's HTTP routes as far as the tests use them, with its error answers."""

import base64
import io

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from PIL import Image

from modules import errors, infotext_utils, processing, scripts, sd_models, shared
from modules.call_queue import queue_lock

FIELDS = {
    "Steps": ("steps", int), "Sampler": ("sampler_name", str), "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int), "Size-1": ("width", int),
    "Size-2": ("height", int),
}  # fmt: skip


class Api:
    def __init__(self):
        self.app = FastAPI()
        self.runners = {is_img2img: scripts.ScriptRunner(is_img2img) for is_img2img in (False, True)}
        self._answer_errors()
        routes = {
            ("POST", "txt2img"): lambda request=Body(...): self._generate(request, False),  # noqa: B008
            ("POST", "img2img"): lambda request=Body(...): self._generate(request, True),  # noqa: B008
            ("POST", "interrupt"): shared.state.interrupt,
            ("POST", "skip"): shared.state.skip,
            ("GET", "progress"): self._progress,
            ("GET", "options"): lambda: shared.opts.data,
            ("POST", "options"): self._set_options,
            ("POST", "refresh-loras"): self._refresh_loras,
            ("POST", "refresh-checkpoints"): sd_models.list_models,
            ("GET", "sd-models"): lambda: [
                {"filename": info.filename} for info in sd_models.checkpoints.values()
            ],
            ("GET", "script-info"): lambda: [
                info for runner in self.runners.values() for info in runner.info()
            ],
        }
        for (method, name), endpoint in routes.items():
            self.app.add_api_route(f"/sdapi/v1/{name}", endpoint, methods=[method], response_model=None)
        self.app.add_api_route("/internal/sysinfo", lambda: {"Exceptions": errors.get_exceptions()})

    def _answer_errors(self):
        def answer(_request: Request, error: Exception):
            fault = {
                "error": type(error).__name__,
                "detail": getattr(error, "detail", ""),
                "body": "",
                "errors": str(error),
            }
            return JSONResponse(fault, getattr(error, "status_code", 500))

        @self.app.middleware("http")
        async def catch(request, call_next):
            try:
                return await call_next(request)
            except Exception as error:  # noqa: BLE001 as the host does
                return answer(request, error)

        self.app.exception_handler(HTTPException)(answer)

    def _progress(self):
        """The share of the jobs that is done, by the host's own arithmetic."""
        state, share = shared.state, 0
        if state.job_count:
            share = 0.01 + (state.job_no / state.job_count if state.job_count > 0 else 0)
            if state.sampling_steps > 0:
                share += 1 / state.job_count * state.sampling_step / state.sampling_steps
        return {
            "progress": min(share, 1),
            "textinfo": state.textinfo,
            "state": {"job_count": state.job_count},
        }

    def _refresh_loras(self):
        """Whatever is being generated: the host takes no lock for it."""
        import networks

        networks.list_available_networks()

    def _set_options(self, request=Body(...)):  # noqa: B008
        with queue_lock:
            for name, value in request.items():
                shared.opts.set(name, value)
            sd_models.reload_model_weights()

    def _generate(self, request, is_img2img):
        runner = self.runners[is_img2img]
        args = list(runner.default_args)
        if infotext := request.pop("infotext", None):
            self._apply_infotext(request, infotext, runner, args)
        if title := request.pop("script_name", None):
            script = runner.named(title)
            args[script.args_from : script.args_to] = request.pop("script_args")
            args[0] = runner.selectable_scripts.index(script) + 1
        for title, given in request.pop("alwayson_scripts", {}).items():
            script = runner.named(title)
            if script is None:
                raise HTTPException(422, f"always on script {title} not found")
            for index in range(min(script.args_to - script.args_from, len(given["args"]))):
                args[script.args_from + index] = given["args"][index]
        if is_img2img:
            request["init_images"] = [
                Image.open(io.BytesIO(base64.b64decode(image))) for image in request["init_images"]
            ]
        kind = (
            processing.StableDiffusionProcessingImg2Img
            if is_img2img
            else processing.StableDiffusionProcessingTxt2Img
        )
        with queue_lock:
            p = kind(**{name: value for name, value in request.items() if name in processing.DEFAULTS})
            p.scripts, p.script_args = runner, args
            p.do_not_save_samples, p.outpath_samples = (
                not request.get("save_images", False),
                shared.opts.outdir_txt2img_samples,
            )
            shared.state.begin()
            try:
                processed = runner.run(p) or processing.process_images(p)
            finally:
                shared.state.end()
        return {
            "images": [as_base64(image) for image in processed.images],
            "parameters": {},
            "info": processed.js(),
        }

    def _apply_infotext(self, request, infotext, runner, args):
        prompt, _, last = infotext.rpartition("\n")
        params = infotext_utils.read(last)
        prompt, _, negative = prompt.partition("\nNegative prompt: ")
        read = {
            "prompt": prompt,
            "negative_prompt": negative,
            **{field: of(params[name]) for name, (field, of) in FIELDS.items() if name in params},
        }
        request.update({name: value for name, value in read.items() if name not in request})
        for component, source in runner.infotext_fields:
            value = source(params) if callable(source) else params.get(source)
            if value is not None:
                kind = type(component.value)
                args[runner.inputs.index(component)] = value if isinstance(value, kind) else kind(value)


def as_base64(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
