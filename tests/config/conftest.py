"""Every test of this room sees the toy registries only."""

from tests.config.toy import toy  # noqa: F401
