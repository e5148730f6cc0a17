"""What the K-LoRA panel asks for before and after a generation, on routes beside those of the host's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from klora.errors import Cancelled, KLoraError, SettingsError
from klora.hosts.webui import HOST
from klora.settings import PLAN_FIELDS, Settings
from klora.webui import preflight
from klora.webui.analysis_queue import Busy, slot, spare_turn, while_connected
from klora.webui.api import whole_numbers


def register(app: FastAPI) -> None:
    """Add the routes to the host's app, behind its page's log-in if it has one."""
    common: dict[str, Any] = {
        "methods": ["POST"],
        "include_in_schema": False,
        "response_model": None,
        "dependencies": [Depends(_logged_in)],
    }
    app.add_api_route("/klora/internal/card", files, **common)
    app.add_api_route("/klora/internal/scores", scores, **common)
    app.add_api_route("/klora/internal/strengths", strengths, **common)


def files(request: dict[str, Any] = Body(...)) -> JSONResponse:  # noqa: B008
    """The files of the chosen LoRAs and the checkpoint: the answer of `preflight.card`."""
    return JSONResponse(preflight.card(_names(request)))


async def scores(request: Request, asked: dict[str, Any] = Body(...)) -> JSONResponse:  # noqa: B008
    """The scores of the pair: the answer of `preflight.scores`.

    The work stops when the page disconnects, and waits while anybody else needs the machine. If something is
    wrong, the answer is {"problem": sentence, "again": whether to ask again soon}. Its status is 200 too,
    because browsers log any other as an error.
    """
    return await while_connected(request, lambda gone: _answer(_scores, asked, gone))


async def strengths(request: Request, asked: dict[str, Any] = Body(...)) -> JSONResponse:  # noqa: B008
    """The plan of the pair: the answer of `preflight.strengths`. Otherwise as `scores`."""
    return await while_connected(request, lambda gone: _answer(_strengths, asked, gone))


def _scores(asked: dict[str, Any], cancelled: Callable[[], bool]) -> dict[str, Any]:
    return preflight.scores(_names(asked), _settings(asked).k_scale, cancelled, spare_turn)


def _strengths(asked: dict[str, Any], cancelled: Callable[[], bool]) -> dict[str, Any]:
    settings, (numbers, problems) = _settings(asked), whole_numbers(asked)
    if problems:
        raise SettingsError(problems)
    return preflight.strengths(
        _names(asked), settings, numbers["steps"], numbers["seed"], cancelled, spare_turn
    )


def _settings(asked: dict[str, Any]) -> Settings:
    return Settings.parse({name: value for name, value in asked.items() if name in PLAN_FIELDS})


def _answer(
    work: Callable[[dict[str, Any], Callable[[], bool]], dict[str, Any]],
    asked: dict[str, Any],
    gone: Callable[[], bool],
) -> JSONResponse:
    def cancelled() -> bool:
        return gone() or HOST.is_generating() or HOST.is_awaited()

    try:
        with slot():
            return JSONResponse(work(asked, cancelled))
    except Cancelled:
        return _later("The pair will be scored once the WebUI has nothing else to do.")
    except Busy as error:
        return _later(str(error))
    except KLoraError as error:
        return JSONResponse({"problem": str(error), "again": False})


def _later(sentence: str) -> JSONResponse:
    return JSONResponse({"problem": sentence, "again": True})


def _names(request: dict[str, Any]) -> dict[str, str]:
    return {role: str(request.get(role) or "") for role in preflight.ROLES}


def _logged_in(request: Request) -> None:
    """Gradio's own rule: if the page has a log-in, one of the cookies must be a token that it gave out."""
    app = request.app
    if getattr(app, "auth", None) is None and getattr(app, "auth_dependency", None) is None:
        return
    if not any(
        name.startswith("access-token") and app.tokens.get(value) for name, value in request.cookies.items()
    ):
        raise HTTPException(401, detail="Log in to the WebUI's page first.")
