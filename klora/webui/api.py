"""The extension's own HTTP API, beside the host's: settings schema, LoRA list, analysis."""

from __future__ import annotations

from secrets import compare_digest
from threading import BoundedSemaphore
from typing import Any

from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from klora.analysis import analyze
from klora.core.score_cache import ScoreCache
from klora.errors import KLoraError, SettingsError
from klora.settings import Settings, json_schema
from klora.webui import loras, paths

DEFAULT_STEPS, MOST_STEPS = 20, 1000
MOST_WAITING = 4

_waiting = BoundedSemaphore(MOST_WAITING)
_working = BoundedSemaphore(1)


def register(_demo: Any, app: FastAPI) -> None:
    """Add the routes to the host's app, behind its own API authentication if it has one."""
    guards = [Depends(_authenticated)] if _credentials() else []
    routes = (("/schema", "GET", schema), ("/loras", "GET", list_loras), ("/analyze", "POST", analyze_pair))
    for path, method, endpoint in routes:
        app.add_api_route(f"/klora/v1{path}", endpoint, methods=[method], tags=["K-LoRA"], dependencies=guards)


def schema() -> dict[str, Any]:
    """JSON schema of the settings, as alwayson_scripts takes them: {"K-LoRA": {"args": [{...}]}}."""
    return json_schema()


def list_loras() -> list[dict[str, str]]:
    """The LoRAs that can be named as subject or style."""
    return [{"name": lora.name, "alias": lora.alias, "hash": lora.shorthash} for lora in loras.list_loras()]


def analyze_pair(request: dict[str, Any] = Body(..., examples=[{"subject": "my_dog", "style": "ink", "steps": 20}])) -> dict[str, Any]:  # noqa: B008
    """The plan of a pair: the JSON of `python -m klora analyze`. Takes the settings, `steps` (20) and `seed` (0)."""
    values = dict(request)
    try:
        steps, seed = _whole(values, "steps", DEFAULT_STEPS, 1, MOST_STEPS), _whole(values, "seed", 0, 0, 2**63)
        settings = Settings.parse({"enabled": True, **values})
        subject, style = (loras.find(getattr(settings, role), role).path for role in ("subject", "style"))
        if not _waiting.acquire(blocking=False):
            raise HTTPException(503, detail=f"{MOST_WAITING} analyses are waiting already: try again when they are done.")
        try:
            with _working:
                return analyze(subject, style, settings, steps=steps, seed=seed, cache=ScoreCache(paths.cache_folder())).to_json()
        finally:
            _waiting.release()
    except KLoraError as error:
        raise HTTPException(422, detail=str(error)) from error


def _whole(values: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = values.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SettingsError({name: f"{name!r} is a whole number from {low} to {high}."})
    return value


def _credentials() -> dict[str, str]:
    from modules import shared

    return dict(pair.split(":", 1) for pair in (shared.cmd_opts.api_auth or "").split(",") if ":" in pair)


def _authenticated(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
    known = _credentials().get(given.username)
    if known is None or not compare_digest(given.password.encode(), known.encode()):
        raise HTTPException(401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"})
