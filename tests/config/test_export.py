"""JSON Schema, hash and secrets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.export import config_hash, json_schema
from shardwise.config.load import load_config
from shardwise.config.redact import HIDDEN, redact, redact_data
from shardwise.config.schema import AdamWConfig, BatchConfig
from tests.config.toy import ToyModel


def test_schema_lists_what_is_registered() -> None:
    schema = json_schema()
    json.dumps(schema)
    *model, single_keys = schema["properties"]["model"]["oneOf"]
    assert single_keys["propertyNames"]["enum"] == ["max_seq_len", "vocab_size", "weights", "width"]
    assert [m["properties"]["family"]["const"] for m in model] == ["toy"]
    assert model[0]["$ref"].removeprefix("#/$defs/") in schema["$defs"]
    stages = schema["properties"]["stages"]
    assert stages["items"]["oneOf"][0]["properties"]["kind"]["const"] == "learn"
    assert stages["minItems"] == 1
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["stages"]
    assert schema["anyOf"] == [{"required": ["model"]}, {"required": ["init_from"]}]
    assert "width" in schema["$defs"]["ToyModel"]["properties"]
    references = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
    assert references <= set(schema["$defs"])


def test_hash_follows_values_not_the_way_they_were_given() -> None:
    base = {"model": {"family": "toy"}, "stages": [{"kind": "learn", "steps": 2}]}
    plain = config_hash(load_config(base).config)
    assert len(plain) == 32
    assert config_hash(load_config(base, ["seed=0"]).config) == plain
    assert config_hash(load_config(base, ["seed=1"]).config) != plain
    assert config_hash(BatchConfig()) != config_hash(AdamWConfig())
    assert config_hash(ToyModel(width=3)) == config_hash(ToyModel(width=3))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3 at https://user:pa55word@host/x", "pa55word"),
        ("https://host/x?X-Amz-Signature=abcdef&y=1", "abcdef"),
        ("hf_abcdefghijklmnopqrstuvwx", "abcdefghij"),
        ("Authorization: Bearer abc.def-123456", "abc.def"),
        ("wandb_api_key: 0123456789abcdef", "0123456789"),
        ('{"password": "hunter2"}', "hunter2"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABC"),
    ],
)
def test_forms_of_secrets(text: str, hidden: str) -> None:
    assert hidden not in redact(text, {})
    assert HIDDEN in redact(text, {})


def test_ordinary_text_stays() -> None:
    text = "stages.0.tokenizer.pad_token: <pad>\nkey: value\nhttps://host/path?page=2 a@b.c tok_k=3"
    assert redact(text, {"A_KEY": "1", "USER_KEYBOARD": "stages.0", "PATH": "tokenizer"}) == text


@given(
    st.sampled_from(["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "db_password", "AWS_ACCESS_KEY_ID"]),
    st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=8, max_size=40),
    st.text(max_size=20),
    st.text(max_size=20),
)
def test_values_of_secret_variables_are_nowhere(
    name: str, secret: str, before: str, after: str
) -> None:
    data = {"a": [before + secret + after, {"b": secret}], "api_key": "x", "n": 3, "o": None}
    shown = redact_data(data, {name: secret})
    if secret not in HIDDEN:
        assert secret not in json.dumps(shown, ensure_ascii=False).replace(HIDDEN, "|")
    assert shown["api_key"] == HIDDEN and shown["n"] == 3 and shown["o"] is None
