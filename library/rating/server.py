"""The page's server: what the browser asks for, as JSON, and pictures and files by names that we gave them."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from library.errors import UserError
from library.rating.guard import Guard
from library.rating.runs import file_of
from library.rating.session import RatingSession, question_dict
from library.rating.store import Rating
from library.rating.tables import import_ratings, pairs_csv, ratings_csv

PAGE = Path(__file__).with_name("page")
MOST_ASKED, MOST_ANSWERS = 24, 50
KEPT = "private, max-age=31536000, immutable"  # a picture's number is never given to another one
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
Body = dict[str, Any]


def make_app(session: RatingSession, hosts: tuple[str, ...], token: str | None = None) -> Starlette:
    """The server as an ASGI application. See `library.rating.guard.Guard` for hosts and token."""

    def state(body: Body) -> Body:
        first = next(iter(session.live.values()))  # for a page that was open on another project
        return session.state(session.live.get(str(body.get("opinion")).casefold(), first))

    def ask(body: Body) -> Body:
        live = session.opinion(text(body, "opinion"))
        count, prompt = body.get("count", 1), body.get("prompt")
        if not isinstance(count, int) or not 1 <= count <= MOST_ASKED:
            raise UserError(f"count is {count!r}; it goes from 1 to {MOST_ASKED}")
        asked = live.ask(count, pairs=body.get("pairs") is True, prompt=prompt if isinstance(prompt, str) and prompt else None)
        return {"questions": [question_dict(session, question) for question in asked]}

    def rate(body: Body) -> Body:
        live = session.opinion(text(body, "opinion"))
        answers = body.get("answers")
        if not isinstance(answers, list) or not 0 < len(answers) <= MOST_ANSWERS:
            raise UserError(f"answers is a list of 1 to {MOST_ANSWERS}")
        new = session.answer(live, [to_rating(live.reason_of, answer) for answer in answers])
        return {"new": new, "answers": sum(rating.mode != "skip" for rating in live.ratings)}

    def undo(body: Body) -> Body:
        rating = session.opinion(text(body, "opinion")).undo(text(body, "token"))
        pictures = [] if rating is None else [number for number in (rating.first, rating.second) if number is not None]
        return {"pictures": [session.picture(number) for number in pictures]}

    def look(body: Body) -> Body:
        return session.extremes(session.opinion(text(body, "opinion")))

    def correct(body: Body) -> Body:
        live = session.opinion(text(body, "opinion"))
        session.correct(live, whole(body, "picture"), whole(body, "value"), text(body, "token"))
        return {}

    def opinions(body: Body) -> Body:
        return {"name": session.add_opinion(text(body, "name"), whole(body, "levels")).opinion.name}

    def train(body: Body) -> Body:
        return {"run": session.runs.start(session.opinion(text(body, "opinion"))).name}

    def stop(body: Body) -> Body:
        session.runs.stop()
        return {}

    def resume(body: Body) -> Body:
        session.runs.resume(session.opinion(text(body, "opinion")).opinion)
        return {}

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-store"})

    async def picture(request: Request) -> Response:
        row = session.gallery.row_of.get(request.path_params["number"])
        if row is None:
            return PlainTextResponse("there is no such picture", status_code=404)
        path = session.project.path_of(session.gallery.pictures[row].shown)
        if not path.is_file():
            return PlainTextResponse("the picture's file is gone", status_code=404)
        return FileResponse(path, headers={"cache-control": KEPT})

    async def table(request: Request) -> Response:
        write = ratings_csv if request.path_params["name"] == "ratings" else pairs_csv
        live = session.opinion(request.query_params.get("opinion", ""))
        content = await run_in_threadpool(write, session.project, live.opinion)
        name = f"{request.path_params['name']}.csv"
        return Response(content, media_type="text/csv", headers={"content-disposition": f'attachment; filename="{name}"'})

    async def run_file(request: Request) -> Response:
        folder = session.runs.latest(session.opinion(request.query_params.get("opinion", "")).opinion)
        found = None if folder is None else file_of(folder, request.path_params["name"])
        if found is None:
            return PlainTextResponse("the training has not written this", status_code=404)
        path, kind = found
        headers = {"cache-control": "no-store", "content-security-policy": REPORT_POLICY}
        saved = path.name if path.suffix in (".safetensors", ".json") else None
        return FileResponse(path, media_type=kind, headers=headers, filename=saved)

    async def import_table(request: Request) -> Response:
        live = session.opinion(request.query_params.get("opinion", ""))
        content = await request.body()

        def read() -> tuple[int, int]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "table.csv")
                path.write_bytes(content)
                return import_ratings(session.project, live.opinion, path)

        new, missing = await run_in_threadpool(read)
        live.reload()
        return json_response({"new": new, "missing": missing})

    functions = (state, ask, rate, undo, look, correct, opinions, train, stop, resume)
    routes = [
        Route("/", index),
        *(Route(f"/api/{function.__name__}", in_thread(function), methods=["POST"]) for function in functions),
        Route("/api/import", import_table, methods=["POST"]),
        Route("/pictures/{number:int}", picture),
        Route("/tables/{name}.csv", table),
        Route("/run/{name}", run_file),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={UserError: refused, ClientDisconnect: refused},
    )


def in_thread(function: Callable[[Body], Body]) -> Callable[[Request], Awaitable[Response]]:
    """A function of a JSON object as an endpoint."""

    async def endpoint(request: Request) -> Response:
        try:
            body = await request.json()
        except UserError:
            raise  # it is too long
        except (ValueError, RecursionError) as error:
            raise UserError("the request is no JSON") from error
        if not isinstance(body, dict):
            raise UserError("the request is no JSON object")
        return json_response(await run_in_threadpool(function, body))

    return endpoint


def json_response(content: Body) -> Response:
    return JSONResponse(content, headers={"cache-control": "no-store"})


async def refused(request: Request, error: Exception) -> Response:
    """A sentence with code 400; nobody reads that of a connection that broke off."""
    return JSONResponse({"error": str(error)}, status_code=400) if request.method == "POST" else PlainTextResponse(str(error), 400)


def to_rating(reason_of: Callable[[str], str], answer: object) -> Rating:
    """An answer of the page. Raises UserError for what cannot be one; the rest is the store's to check."""
    if not isinstance(answer, dict):
        raise UserError("an answer is a JSON object")
    pictures, value = answer.get("pictures"), answer.get("value")
    numbers = (
        isinstance(pictures, list) and len(pictures) in (1, 2) and all(type(number) is int and 0 < number < 2**62 for number in pictures)
    )
    if not numbers or not (value is None or type(value) in (int, float)):
        raise UserError("an answer names one or two pictures, and its value is a number")
    token = text(answer, "token")
    return Rating(
        token=token,
        mode=text(answer, "mode"),
        first=pictures[0],  # pyright: ignore[reportOptionalSubscript]
        second=pictures[1] if len(pictures) == 2 else None,  # pyright: ignore[reportOptionalSubscript, reportArgumentType]
        value=value,
        reason=reason_of(token),
    )


def text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} is {value!r:.60}; give a text")
    return value


def whole(body: Body, name: str) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value < 2**62:
        raise UserError(f"{name} is {value!r:.60}; give a whole number")
    return value
