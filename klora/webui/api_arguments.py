"""A check on the host's own routes: K-LoRA's `args` must be a list.

Otherwise the host fails with `KeyError: 0` before any script is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.routing import APIRoute

ROUTES = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
SCRIPT = "k-lora"


def register(app: FastAPI) -> None:
    """Add the check to the host's routes, after their own dependencies such as the log-in."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path in ROUTES:
            check = get_parameterless_sub_dependant(depends=Depends(_check), path=route.path_format)
            route.dependant.dependencies.append(check)


async def _check(request: Request) -> None:
    try:
        body: Any = await request.json()
    except ValueError:
        return
    scripts = body.get("alwayson_scripts") if isinstance(body, Mapping) else None
    for name, given in scripts.items() if isinstance(scripts, Mapping) else ():
        args = given.get("args", []) if isinstance(given, Mapping) else []
        if name.lower() == SCRIPT and not isinstance(args, list):
            raise HTTPException(
                422,
                f"'args' of K-LoRA must be a list, not {str(args)[:60]!r}: put the settings into it as one "
                'dict, "args": [{"subject": "…", "style": "…"}].',
            )
