"""The HTML report."""

from shardwise.lazy import callable_room

callable_room(__name__, "shardwise.report.api:report")
