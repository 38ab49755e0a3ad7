"""Secrets go, whatever they are called or look like; ordinary values stay as they are."""

from __future__ import annotations

import base64
import json
import string
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.config import yaml12
from shardwise.config.redact import HIDDEN, redact, redact_data

LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def some(alphabet: str, low: int, high: int | None = None) -> st.SearchStrategy[str]:
    """Words of an alphabet; with a digit, a small and a capital letter where it has them."""
    kinds = [string.digits, string.ascii_lowercase, string.ascii_uppercase]
    parts = [
        st.sampled_from([c for c in kind if c in alphabet])
        for kind in kinds
        if set(kind) & set(alphabet)
    ]
    rest = st.text(alphabet, min_size=low - len(parts), max_size=(high or low) - len(parts))
    return st.tuples(rest, *parts).map("".join)


BASE64 = some(LETTERS + "+/", 24, 60)
SHAPED = st.one_of(
    some(LETTERS, 34).map("hf_{}".format),
    some(LETTERS, 36).map("ghp_{}".format),
    some(LETTERS, 36).map("ghs_{}".format),
    some(LETTERS + "_", 60, 82).map("github_pat_{}".format),
    some(LETTERS, 20).map("glpat-{}".format),
    some(LETTERS, 48).map("sk-{}".format),
    some(LETTERS + "-_", 60, 90).map("sk-proj-{}".format),
    some(LETTERS + "-_", 60, 90).map("sk-ant-api03-{}".format),
    some(LETTERS, 24).map("sk_live_{}".format),
    some(string.ascii_uppercase + string.digits, 16).map("AKIA{}".format),
    some(LETTERS, 24).map("xoxb-123456789012-{}".format),
    some(LETTERS + "-_", 35).map("AIza{}".format),
    some(LETTERS, 36).map("npm_{}".format),
    some(LETTERS + "-_", 60).map("nvapi-{}".format),
    st.tuples(*(some(LETTERS + "-_", 20, 60) for _ in range(3))).map(lambda p: "eyJ" + ".".join(p)),
)
PASSWORD = (
    st.text(LETTERS + "/@:#?!$%*+-_.", min_size=6, max_size=20)
    .filter(lambda p: p[0] in LETTERS and p[-1] in LETTERS and sum(c.isalpha() for c in p) > 2)
    .map("Z9{}".format)
)  # no word of the texts around it
NAMES = [
    "password", "db.passwd", "PASSPHRASE", "ssh_passphrase", "pwd", "api_key", "apikey", "api-key",
    "openai.apikey", "X-Api-Key", "client_secret", "aws_secret_access_key", "secret", "HF_TOKEN",
    "GITHUB_TOKEN", "auth_token", "accessToken", "credentials", "private_key", "wandb_api_key",
    "AccountKey", "session_token",
]  # fmt: skip
AROUND = st.text(string.ascii_letters + " \n.,:;()[]{}=\"'", max_size=20)


@given(AROUND, SHAPED, AROUND)
@settings(max_examples=200)
def test_a_secret_is_known_by_its_shape(before: str, secret: str, after: str) -> None:
    for text in (f"{before} {secret} {after}", f"{before}={secret},{after}", f'"{secret}"'):
        assert secret[8:] not in redact(text, {}) and HIDDEN in redact(text, {})


@given(st.sampled_from(NAMES), PASSWORD)
@settings(max_examples=200)
def test_a_secret_is_known_by_its_name(name: str, secret: str) -> None:
    for text in (
        f"{name}={secret}",
        f"{name}: {secret} and more",
        f'{{"{name}": "{secret}", "n": 1}}',
        json.dumps(json.dumps({name: secret})),
        f"the override 'stages.0.{name}={secret}' is none",
        f"{name} = '{secret}'",
        yaml12.dump({"a": {name: secret}}),
    ):
        shown = redact(text, {})
        assert secret not in shown.replace(HIDDEN, "") and HIDDEN in shown, (text, shown)
    for data in (
        {name: secret},
        {f"a.b.{name}": secret},
        {name: [secret, {"x": secret}]},
        {"name": name, "value": secret},
        ["--" + name, secret],
        {"command": f"run --{name} {secret} --n 2"},
    ):
        assert secret not in json.dumps(redact_data(data, {})), data


@given(
    st.sampled_from(["https", "postgres", "redis", "s3", "git+https", "mongodb+srv"]),
    st.sampled_from(["user", "alice.b", "", "u-1"]),
    PASSWORD,
    st.sampled_from(["host", "db.example.org:5432", "10.0.0.1"]),
)
@settings(max_examples=200)
def test_urls_lose_their_credentials(scheme: str, user: str, secret: str, host: str) -> None:
    for url in (f"{scheme}://{user}:{secret}@{host}/a?b=c", f"{scheme}:/{user}:{secret}@{host}"):
        shown = redact(f"cannot reach {url}, sorry", {})
        assert secret not in shown and host in shown, (url, shown)
    token = f"https://{quote(secret, safe='')}@{host}/x"
    assert quote(secret, safe="") not in redact(token, {})


@given(some(LETTERS + "%", 20, 60))
def test_signed_urls_lose_their_signature(secret: str) -> None:
    for query in (
        f"X-Amz-Algorithm=A&X-Amz-Signature={secret}&x=1",
        f"X-Amz-Credential={secret}",
        f"sv=2020&sig={secret}",
        f"Expires=1&Signature={secret}&Key-Pair-Id=k",
        f"access_token={secret}",
        f"X-Goog-Signature={secret}",
    ):
        assert secret not in redact(f"https://bucket.s3.amazonaws.com/k?{query}", {})


@given(st.text(LETTERS, min_size=3, max_size=12), PASSWORD, BASE64)
def test_headers(user: str, password: str, body: str) -> None:
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    for text in (
        f"Authorization: Basic {basic}",
        f"curl -H 'authorization: Bearer {body}'",
        f'{{"Authorization": "token {body}"}}',
        f"basic {basic}",
    ):
        shown = redact(text, {})
        assert basic not in shown and body not in shown and HIDDEN in shown
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n{body}\n-----END RSA PRIVATE KEY-----"
    for text in (pem, json.dumps(pem), pem[:-40], pem.replace("RSA ", "")):
        assert body not in redact(f"x {text} y", {})
    assert redact(f"x {pem} y", {}).endswith(" y")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("wandb login 0123456789abcdef0123456789abcdef01234567", "0123456789abcdef0123"),
        ("machine api.wandb.ai login user password s3cret1", "s3cret1"),
        ("https://hooks.slack.com/services/T0000/B0000/XXXXyyyyZZZZ", "XXXXyyyy"),
        ("proxy alice:hunter22@proxy.corp:3128 refused", "hunter22"),
        ("Server=x;Pwd=hunter2;Database=y", "hunter2"),
        ('password: "with a space"', "a space"),
        ('password: "unclosed', "unclosed"),
        ("--api-key abc123def --steps 5", "abc123def"),
    ],
)
def test_forms(text: str, hidden: str) -> None:
    assert hidden not in redact(text, {}) and HIDDEN in redact(text, {})


def test_spellings_of_a_variable_s_value() -> None:
    environ = {"DB_PASSWORD": 'pa"ss/wörd+1', "PWD": "/home/somebody", "PGPASSWORD": "another-one"}
    for text in ('pa"ss/wörd+1', quote('pa"ss/wörd+1', safe=""), json.dumps('pa"ss/wörd+1')):
        assert "rd" not in redact(text, environ)
    assert redact("/home/somebody/x another-one", environ) == f"/home/somebody/x {HIDDEN}"


WORD = st.text(string.ascii_lowercase, min_size=2, max_size=9)
NAME = st.lists(WORD, min_size=1, max_size=4).map("-".join)
ORDINARY = st.one_of(
    st.text(HEX, min_size=32, max_size=32),  # xxh3-128
    st.text(HEX, min_size=40, max_size=40),  # a commit
    st.text(HEX, min_size=64, max_size=64),
    st.uuids().map(str),
    st.tuples(NAME, NAME).map("/".join),
    st.tuples(NAME, NAME).map("hf-internal-testing/{0[0]}-{0[1]}".format),
    NAME.map("hf_internal_{}".format),
    NAME.map("sk-learn-{}".format),
    st.lists(NAME, min_size=3, max_size=9).map(lambda p: "/" + "/".join(p) + ".jsonl"),
    st.lists(NAME, min_size=1, max_size=3).map(
        lambda p: "https://huggingface.co/datasets/" + "/".join(p) + "/resolve/main/a.parquet?p=2"
    ),
    NAME.map("s3://bucket/{}@v2/part-00000".format),
    NAME.map("git@github.com:org/{}.git".format),
    NAME.map("ssh://git@github.com/org/{}.git".format),
    NAME.map("https://host:8080/@scope/{}".format),
    NAME.map("https://registry.npmjs.org/@org/{}".format),
    NAME.map("text:/data/{}@2026/x.txt".format),
    NAME.map("{}@example.org".format),
    NAME.map("jsonl:corpora/{}@main.json".format),
    NAME.map("basic {}".format),
    NAME.map("the bearer {}".format),
    st.floats(allow_nan=False).map(str),
    st.sampled_from(
        [
            "<|endoftext|>",
            "<|im_start|>user\nHello<|im_end|>",
            "dp2.zero1.tp2.sp.pp2.zbv",
            "layers.0.attention.q_proj.weight",
            "2026-11-29T11:20:29.123456+00:00",
            "task-01-key",
            "-----BEGIN CERTIFICATE-----",
            "passwords are not stored",
            "AKIA",
            "sk-",
            "eyJ",
            "http://localhost:8080/a@b",
            "${HF_TOKEN}",
            "the token is 5 characters",
        ]
    ),
)
PLAIN_NAMES = [
    "path", "name", "key", "keys", "token", "tokens", "eos_token", "pad_token", "EOS_TOKEN",
    "max_tokens", "token_ids", "tokenizer", "signature_columns", "author", "compass", "basic",
    "bearer", "keyboard", "passes", "secretary", "PWD_DIR", "public_key", "user_token",
]  # fmt: skip


@given(ORDINARY, st.sampled_from(PLAIN_NAMES))
@settings(max_examples=250)
def test_ordinary_values_stay(value: str, name: str) -> None:
    data = {name: value, "list": [value, f"{name}: {value}", f"stages.0.{name}={value}"]}
    assert redact_data(data, {}) == data
    text = yaml12.dump(data)
    assert redact(text, {}) == text


def test_what_says_nothing_stays() -> None:
    data = {"password": None, "api_key": "", "secret": "${DB_SECRET}", "use_password": False}
    assert redact_data(data, {}) == data
    assert redact_data({"password": 123456}, {}) == {"password": HIDDEN}
    assert redact("PWD=/home/me OLDPWD=/x", {}) == "PWD=/home/me OLDPWD=/x"


@pytest.mark.parametrize("piece", ["a-", "passwd", "eyJ", "http://a:", "-----BEGIN ", "x:y@", "--"])
def test_long_texts_cost_no_more_than_their_length(piece: str) -> None:
    """Each beginning of a form, over and over: with quadratic work this would not end."""
    redact(piece * (200_000 // len(piece)), {})
