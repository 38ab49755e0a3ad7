"""Inference that trains: a server as OpenAI's clients speak, its log, and what is learned from it.

`serve` answers and logs; `learn` reads the log, trains an adapter, and moves the pointer that the
server watches if the gate lets it. What both know: `log` (records on disk), `versions` (adapters
on disk and the pointer). Pure: `privacy`, `feedback`, `gate`, `texts`. Starlette and uvicorn (extra
``serve``) are imported in `http` and `listen` alone.

The room is called itself: `shardwise.serve(...)`.
"""

from shardwise.lazy import callable_room

callable_room(__name__, "shardwise.serve.api:serve")
