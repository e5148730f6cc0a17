"""The extension's own HTTP API, beside the host's: settings schema, LoRA list, analysis."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from secrets import compare_digest
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from klora.analysis import Analysis, analyze
from klora.errors import Cancelled, KLoraError, SettingsError, printable
from klora.hosts.fonts import host_font
from klora.hosts.webui import HOST
from klora.selection_map import draw_map
from klora.settings import Settings, json_schema
from klora.webui import loras, options
from klora.webui.analysis_queue import Busy, slot, turn, while_connected

WHOLE_NUMBERS = {"steps": (20, 1, 1000), "seed": (0, 0, 2**63 - 1)}
"""What an analysis takes besides the settings: {name: (default, minimum, maximum)}."""

MOST_BYTES = 1 << 16
FORMATS = ("json", "png")
EXAMPLE = {"subject": "my_dog", "style": "ink_drawing", "alpha": 1.5, "steps": 20}


def register(app: FastAPI) -> None:
    """Add the routes to the host's app, behind its API authentication if it has one."""
    common: dict[str, Any] = {
        "tags": ["K-LoRA"],
        "dependencies": [Depends(_authenticate)] if HOST.api_credentials() else [],
    }
    app.add_api_route(
        "/klora/v1/schema", schema, methods=["GET"], summary="JSON schema of the K-LoRA settings", **common
    )
    app.add_api_route(
        "/klora/v1/loras",
        list_loras,
        methods=["GET"],
        summary="LoRAs to choose as subject and style",
        **common,
    )
    app.add_api_route(
        "/klora/v1/analyze", analyze_pair, methods=["POST"], summary="Plan of a pair, without an image",
        response_model=None, openapi_extra=_documented_request(), responses={
            200: {"description": "The plan, or its selection map", "content": {"image/png": {}}},
            413: {"description": "The request is too long"},
            422: {"description": "What is wrong: {detail, fields}"},
            503: {"description": "Busy"},
        },
        **common,
    )  # fmt: skip


def schema() -> dict[str, Any]:
    """The settings as txt2img and img2img take them: `"alwayson_scripts": {"K-LoRA": {"args": [{...}]}}`."""
    return json_schema(options.read().run_defaults())


def list_loras() -> list[dict[str, str]]:
    """Name, alias and the host's short hash of every LoRA that can be subject or style.

    The hash is "" until the host has hashed the file.
    """
    return [
        {"name": printable(lora.chosen_as), "alias": printable(lora.alias), "hash": lora.shorthash}
        for lora in HOST.loras()
    ]


async def analyze_pair(request: Request) -> Response:
    """Which LoRA is applied in each layer at each step, as `python -m klora analyze` writes it as JSON.

    Takes the settings, `steps`, `seed` and `format`. With `"format": "png"` the answer is the selection map.
    """
    content = await _content(request)
    if content is None:
        return JSONResponse(
            {
                "detail": f"The request is longer than {MOST_BYTES} bytes, more than any analysis needs.",
                "fields": {},
            },
            413,
        )
    return await while_connected(request, lambda gone: _answer(content, gone))


async def _content(request: Request) -> bytes | None:
    """The body of a request, or None if it is longer than MOST_BYTES."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            return None
    return content


def _answer(content: bytes, cancelled: Callable[[], bool]) -> Response:
    try:
        settings, steps, seed, form = _parsed(content)
        subject, style = (loras.find(getattr(settings, role), role).path for role in ("subject", "style"))
        with slot():
            return _written(
                analyze(
                    subject,
                    style,
                    settings,
                    steps=steps,
                    seed=seed,
                    loaded=loras.loaded_family(),
                    cancelled=cancelled,
                    turn=lambda: turn(cancelled),
                    **options.read().for_analysis(),
                ),
                form,
            )
    except Cancelled:
        return JSONResponse(
            {"detail": "The client disconnected, so the analysis was stopped.", "fields": {}}, 499
        )
    except Busy as error:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})
    except KLoraError as error:
        return JSONResponse({"detail": str(error), "fields": getattr(error, "problems", {})}, 422)


def _written(analysis: Analysis, form: str) -> Response:
    if form == "json":
        return JSONResponse(analysis.to_json())
    png = io.BytesIO()
    names = analysis.subject.path.stem, analysis.style.path.stem
    draw_map(analysis.plan, *names, fonts=host_font).save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")


def _parsed(content: bytes) -> tuple[Settings, int, int, str]:
    """The settings, steps, seed and format of a request.

    Raises:
        SettingsError: lists everything that is wrong with it.
        KLoraError: it is not a JSON object.
    """
    try:
        request = json.loads(content)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise KLoraError(
            'The request is not a JSON object: send the settings by name, as {"subject": "…", "style": "…"}.'
        )
    numbers, problems = whole_numbers(request)
    form = request.get("format", FORMATS[0])
    if form not in FORMATS:
        problems["format"] = f"'format' must be {' or '.join(FORMATS)}, not {str(form)[:60]!r}."
    settings = Settings()
    try:
        settings = Settings.parse(
            {
                **{name: value for name, value in request.items() if name not in (*numbers, "format")},
                "enabled": True,
            }
        )
    except SettingsError as error:
        problems = {**error.problems, **problems}
    if problems:
        raise SettingsError(problems)
    return settings, numbers["steps"], numbers["seed"], form


def whole_numbers(request: dict[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
    """The steps and the seed of a request, and {name: what is wrong with it}."""
    numbers = {name: request.get(name, default) for name, (default, _, _) in WHOLE_NUMBERS.items()}
    problems = {
        name: f"{name!r} must be a whole number from {low} to {high}, not {str(numbers[name])[:60]!r}."
        for name, (_, low, high) in WHOLE_NUMBERS.items()
        if isinstance(numbers[name], bool)
        or not isinstance(numbers[name], int)
        or not low <= numbers[name] <= high
    }
    return numbers, problems


def _documented_request() -> dict[str, Any]:
    body = json_schema()
    del body["$schema"]
    for name, (default, low, high) in WHOLE_NUMBERS.items():
        body["properties"][name] = {
            "title": name.capitalize(),
            "type": "integer",
            "default": default,
            "minimum": low,
            "maximum": high,
        }
    body["properties"]["format"] = {
        "title": "Format", "description": "json: the plan. png: its selection map.", "enum": list(FORMATS),
        "default": FORMATS[0],
    }  # fmt: skip
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {**body, "example": EXAMPLE}}},
        }
    }


def _authenticate(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
    known = HOST.api_credentials().get(given.username)
    if known is None or not compare_digest(given.password.encode(), known.encode()):
        raise HTTPException(
            401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
        )
