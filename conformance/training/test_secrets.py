"""Canary secrets in the environment, in settings and in URLs appear in no file, log, report or traceback of a run."""

import base64
import html
import json
import re
import urllib.parse

import pytest
import table_run
from places import ROOT

pytest.importorskip("tyro", reason="the command line's extra is not installed")

import faults

from gvpo_core.training import cli
from gvpo_core.training.config.file import read_config, write_config
from gvpo_core.training.config.secrets import SHORTEST, hide, hide_command, hide_settings, is_secret, secrets_of

pytestmark = pytest.mark.core

CANARY = "canary-4711"
OPTIONS = f"""
[rewards.right.options]
api_key = "{CANARY}-option"
endpoint = "https://user:{CANARY}-password@judge.example/v1?model=x&token={CANARY}-query"
"""
REWARD = """
import os

def reward(prompts, completions, answer, api_key, endpoint, **_):
    assert api_key.startswith("canary") and "password" in endpoint and os.environ["JUDGE_TOKEN"].startswith("canary")
    print(api_key)
    BODY
    return [float(c == a) for c, a in zip(completions, answer)]
"""
RAISE = "raise RuntimeError(f'401 for {endpoint} with {api_key} and ' + os.environ['JUDGE_TOKEN'])"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, caplog):
    """Runs the command line with secrets everywhere; returns its status and everything it wrote and said."""
    monkeypatch.setenv("JUDGE_TOKEN", f"{CANARY}-environment")
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-wandb")

    def run(body="pass", *arguments, change=lambda text: text):
        (tmp_path / "mine.py").write_text(REWARD.replace("BODY", body))
        reward = f'function = "{tmp_path / "mine.py"}:reward"\nmax_failures = 1.0'
        config = table_run.make(tmp_path, steps=2, reward=reward, extra=OPTIONS)
        config.write_text(change(config.read_text()))
        # In a separate process: logging is set up as a person has it.
        status = faults.run(config) if not arguments else cli.main(["train", str(config), *arguments])
        files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
        text = b"".join(p.read_bytes() for p in files).decode("utf-8", "replace")
        said = capfd.readouterr()
        text += said.out + said.err
        if (tmp_path / "output.txt").exists():
            text += (tmp_path / "output.txt").read_text()
        return status, text

    return run


def test_a_finished_run_keeps_none(run, tmp_path):
    status, text = run()
    assert status == 0, text
    assert "judge.example" in text and "api_key" in text  # what is no secret is kept
    assert CANARY not in text
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "environment.json").exists()


@pytest.mark.parametrize(
    ("body", "ends"),
    [(RAISE, 1), (f"if completions[0] == 'a': {RAISE}", 0), ("import sys; sys.exit(endpoint)", 1)],
    ids=["always", "sometimes", "exit"],
)
def test_a_reward_that_says_them_in_its_error_is_not_quoted(run, body, ends):
    status, text = run(body)
    assert status == ends, text
    assert "reward right" in text and "***" in text
    assert CANARY not in text


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('backend = "table"', 'backend = "torch"', "gvpo: "),
        ("train.jsonl", f"https://me:{CANARY}@host/x.jsonl", "there is no such file"),
        ('endpoint = "', f'endpoint = "https://me:{CANARY}@x"\n"', "is not valid TOML"),
    ],
    ids=["model", "data", "toml"],
)
def test_a_refused_run_names_none(run, old, new, part, tmp_path):
    def change(text):
        assert old in text
        text = text.replace(f'path = "{tmp_path}"', f'path = "hub/{CANARY}?token={CANARY}"') if "torch" in new else text
        return text.replace(old, new)

    status, text = run(change=change)
    assert status in (1, 2) and part in text, text
    assert CANARY not in text


def test_an_error_of_ours_that_nobody_foresaw_hides_them_too(run, monkeypatch, capfd):
    from gvpo_core.training import loop

    def broken(*args, **options):
        raise LookupError(f"{CANARY}-option in https://user:{CANARY}@host")

    monkeypatch.setattr(loop, "improve", broken)
    status, text = run("pass", "--run.seed", "0")
    assert status == 1 and "Traceback" in text and "LookupError: *** in https://***@host" in text
    assert CANARY not in text


def test_options_are_read_from_the_environment_and_saved_as_written(run, tmp_path):
    status, text = run(change=lambda text: text.replace(f'"{CANARY}-option"', '"$JUDGE_TOKEN"'))
    assert status == 0, text
    assert CANARY not in text
    assert read_config_text(tmp_path)["rewards"]["right"]["options"]["api_key"] == "$JUDGE_TOKEN"


@pytest.mark.parametrize("body", ["pass", RAISE], ids=["finished", "quoted"])
def test_a_variable_is_a_secret_by_the_option_that_reads_it(run, monkeypatch, body):
    monkeypatch.setenv("JUDGE", f"{CANARY}-judge")  # a name that says nothing
    status, text = run(body, change=lambda text: text.replace(f'"{CANARY}-option"', '"$JUDGE"'))
    assert status == (1 if body == RAISE else 0), text
    assert ("401 for https://***@judge.example" in text and "with *** and ***" in text) is (body == RAISE)
    assert CANARY not in text


def test_options_of_the_command_line_are_not_kept(run, monkeypatch, tmp_path):
    options = ["--rewards.right.options", "api_key", f"{CANARY}-word", "endpoint", "the-password-judge.example"]
    monkeypatch.setattr("sys.argv", ["gvpo", "train", "config.toml", *options])
    status, text = run("pass", *options, change=lambda text: text.replace(OPTIONS, ""))
    assert status == 0, text
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["command"][-4:] == [
        "api_key", "***", "endpoint", "the-password-judge.example",
    ]  # fmt: skip
    assert CANARY not in text


def read_config_text(tmp_path):
    import tomllib

    return tomllib.loads((tmp_path / "run" / "config.toml").read_text())


def test_a_variable_that_is_not_set_and_a_secret_that_was_left_out_are_named(run, tmp_path, capfd):
    status, text = run(change=lambda text: text.replace(f'"{CANARY}-option"', '"$NOT_THERE"'))
    assert status == 2 and "the environment has no variable NOT_THERE" in text
    assert run()[0] == 0
    assert cli.main(["train", str(tmp_path / "run" / "config.toml")]) == 2
    said = capfd.readouterr().err
    assert (
        "rewards.right.options.api_key is a secret and was not saved with these settings" in said and "'$NAME'" in said
    )


def test_a_run_with_secrets_is_resumed_with_the_config_that_has_them(run, tmp_path):
    assert run()[0] == 0
    assert faults.run(tmp_path / "config.toml") == 0
    assert "other settings" not in (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize(
    ("name", "secret"),
    [("api_key", True), ("HF_TOKEN", True), ("rewards.judge.options.password", True), ("max_tokens", False),
     ("rollout.max_tokens", False), ("optimizer.micro_batch_tokens", False), ("tokenizer", False), ("path", False),
     ("AWS_SECRET_ACCESS_KEY", True), ("accessKey", True)],
)  # fmt: skip
def test_what_is_secret_by_its_name(name, secret):
    assert is_secret(name) is secret


def test_commands_and_texts():
    command = ["gvpo", "train", "c.toml", "--rollout.max_tokens", "8", "--api_key=x1", "--token", "x2", "s3://u:x3@h/p"]
    assert hide_command(command) == [
        "gvpo", "train", "c.toml", "--rollout.max_tokens", "8", "--api_key=***", "--token", "***", "s3://***@h/p",
    ]  # fmt: skip
    command = ["c.toml", "--rewards.a.options", "api_key", "x1", "n", "2", "token=x2", "--seed", "3", "secret", "x4"]
    assert hide_command(command) == [
        "c.toml", "--rewards.a.options", "api_key", "***", "n", "2", "token=***", "--seed", "3", "secret", "x4",
    ]  # fmt: skip
    assert hide_command(["--a.options", "api_key", "$KEY", "b", "known!", "c=known!"], ["known!"]) == [
        "--a.options", "api_key", "$KEY", "b", "***", "c=***",
    ]  # fmt: skip
    url = "see https://h/x?a=1&token=abc&b=2#top and http://h/y?api_key=q'"
    assert hide(url) == "see https://h/x?a=1&token=***&b=2#top and http://h/y?api_key=***'"
    assert hide("https://host/p#access_token=abc123 is") == "https://host/p#access_token=*** is"
    assert hide("mail me@host.org about 3 tokens") == "mail me@host.org about 3 tokens"
    assert secrets_of({"a": {"secret": "long-enough"}}, {"X_TOKEN": "short", "Y_TOKEN": "seven77"}) == {
        "long-enough", "seven77",
    }  # fmt: skip
    assert secrets_of({"api_key": "$JUDGE", "model": "$OTHER"}, {"JUDGE": "seven77", "OTHER": "eight888"}) == {
        "seven77"
    }
    assert hide_settings({"options": {"api_key": "$KEY", "token": "x", "n": 3}}) == {
        "options": {"api_key": "$KEY", "token": "***", "n": 3}
    }


def test_trackers_get_none(run, monkeypatch, tmp_path):
    from gvpo_core.training.run import journal

    shown = {}
    monkeypatch.setattr(journal, "open_trackers", lambda names, folder, config, warn: shown.update(config))
    status, _ = run("pass", "--run.seed", "0")
    assert status == 0 and shown["rewards"]["right"]["options"]["api_key"] == "***"
    assert CANARY not in json.dumps(shown)


def test_settings_written_back_say_what_is_left_out(tmp_path):
    config = read_config(table_run.make(tmp_path, extra=OPTIONS))
    write_config(config, tmp_path / "again.toml")
    assert CANARY not in (tmp_path / "again.toml").read_text()


SECRET = "k3y\"/+ü with spaces'&more"


@pytest.mark.parametrize(
    "form",
    [
        str, repr, json.dumps, lambda s: json.dumps(s, ensure_ascii=False), html.escape, urllib.parse.quote,
        urllib.parse.quote_plus, lambda s: urllib.parse.quote(s, safe=""),
        lambda s: base64.b64encode(s.encode()).decode(),
        lambda s: base64.b64encode(f"u:{s}".encode()).decode(), lambda s: base64.b64encode(f"me:{s}".encode()).decode(),
        lambda s: base64.urlsafe_b64encode(s.encode()).decode(),
        ascii, lambda s: repr(s.encode()), lambda s: s.encode().hex(), lambda s: s.encode().hex().upper(),
        lambda s: re.sub("%..", lambda m: m[0].lower(), urllib.parse.quote(s, safe="")),
        lambda s: urllib.parse.quote(urllib.parse.quote(s, safe=""), safe=""),
        lambda s: json.dumps(json.dumps(s)), lambda s: json.dumps(s).replace("/", "\\/"),
        lambda s: json.dumps(s, ensure_ascii=False).replace("&", "\\u0026"),
        lambda s: html.escape(s).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        lambda s: html.escape(s).replace("&#x27;", "&apos;"),
    ],
    ids=["plain", "repr", "json", "json-utf8", "html", "url", "form", "path", "base64", "basic", "basic-1", "b64-url",
         "ascii", "bytes", "hex", "HEX", "url-lower", "url-twice", "json-twice", "json-php", "json-go", "html-go",
         "xml"],
)  # fmt: skip
def test_a_secret_is_hidden_in_every_form_that_programs_write(form):
    written = form(SECRET)
    left = hide(f"before {written} after", {SECRET})
    assert "***" in left and left.startswith("before ") and left.endswith(" after")
    kept = [part for part in left.split() if part not in ("before", "after")]
    assert sum(len(part.replace("***", "")) for part in kept) <= 8, left  # quotes, and "u:" in base64


@pytest.mark.parametrize(
    "key",
    ["sk-proj-" + "a1B2" * 8, "hf_" + "aB3d" * 8, "ghp_" + "aB3d" * 9, "glpat-" + "aB3d" * 5, "xoxb-12345678-abcdef",
     "AKIA" + "AB12" * 4, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx.SflKxwRJSM"],
)  # fmt: skip
def test_a_key_of_a_known_form_is_hidden_wherever_it_stands(key):
    """As services quote it in their errors, and under the name of an option that says nothing."""
    assert hide(f"Incorrect key {key} given") == "Incorrect key *** given"
    assert (
        hide_settings({"rewards": {"j": {"options": {"model_id": key}}}})["rewards"]["j"]["options"]["model_id"]
        == "***"
    )
    assert hide("sk-learn-estimators and hf_transfer and ghp_") == "sk-learn-estimators and hf_transfer and ghp_"


@pytest.mark.parametrize("part", ["sk-", "eyJ-", "ghp_-", "cookie: ", "password=", "password='", "://", "://a:", "a;"])
def test_long_texts_take_linear_time(part):
    """From every hyphen of this text a key was looked for to its end: hours."""
    text = part * 200_000
    assert hide(text).count(part[:2]) > 0


def test_the_key_of_the_judge_is_not_saved():
    """Its option is called `key`, as the column of another reward may be."""
    options = lambda value: hide_settings({"rewards": {"judge": {"options": {"key": value}}}})["rewards"]["judge"][
        "options"
    ]
    assert options("my-own-server-key-4711") == {"key": "***"}
    assert options("$JUDGE") == {"key": "$JUDGE"} and options("label") == {"key": "label"}
    assert secrets_of({"key": "$JUDGE"}, {"JUDGE": "seven77"}) == {"seven77"}


def test_a_secret_cut_in_the_middle_is_hidden():
    secret = "sk-4711-0123456789abcdef"
    for n in range(8, len(secret)):
        assert hide(f"key {secret[:n]}...", {secret}) == "key ***..."
    assert hide("the password is wrong", {"password-of-mine"}) == "the password is wrong"


def test_the_shortest_hidden_value_is_documented():
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    assert f"{SHORTEST} characters" in page
    assert secrets_of(None, {"A_TOKEN": "x" * SHORTEST, "B_TOKEN": "y" * (SHORTEST - 1)}) == {"x" * SHORTEST}


@pytest.mark.parametrize(
    ("name", "secret"),
    [(n, True) for n in ("DB_PASS", "DB_PWD", "SSH_PASSPHRASE", "SIGNING_KEY", "API_TOKENS", "SESSION_COOKIE",
                         "hf_tokens", "judge_key", "GH_TOKEN", "x.password", "pwd", "pass", "dbPass", "jwt", "auth",
                         "auth_header", "bearer", "DB_CREDS", "passcode", "OPENAI_KEYS", "judge_token", "GITHUB_PAT",
                         "AccountKey", "CONNECTION_STRING", "subscription_key", "SLACK_WEBHOOK_URL", "SENTRY_DSN",
                         "TAILSCALE_AUTHKEY", "otp", "auth_key")]
    + [(n, False) for n in ("PWD", "OLDPWD", "max_tokens", "MAX_TOKENS", "micro_batch_tokens", "monkey",
                            "answer_key", "compass", "tokenizer", "keyboard", "eos_token", "end_token", "stop_token",
                            "pad_token_id", "token_count", "label_keys", "bypass", "prompt_key", "gold_key", "pat")],
)  # fmt: skip
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret


@pytest.mark.parametrize(
    ("url", "left"),
    [
        ("postgres://me:p@ss/w0rd@db.example:5432/x", "postgres://***@db.example:5432/x"),
        ("https://me:a/b@host", "https://***@host"),
        ("redis://:pw@host/0", "redis://***@host/0"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host:8080/users/@me/", "https://host:8080/users/@me/"),
        ("https://host/a@b", "https://host/a@b"),
        ("mailto:me@host", "mailto:me@host"),
        ("Server=x;Pwd=hunter22;User=y", "Server=x;Pwd=***;User=y"),
        ("Authorization: Bearer sk-4711abcd", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpwYXNz=", "Authorization: Basic ***"),
        ("Authorization: token ghs-4711abcd", "Authorization: token ***"),
        ("{'x-api-key': 'abcd1234', 'b': 1}", "{'x-api-key': '***', 'b': 1}"),
        ("Cookie: session=abcdef; id=4711", "Cookie: ***"),
        ("host=h password=hunter22 dbname=x", "host=h password=*** dbname=x"),
        ("host=h password='it is hunter22' dbname=x", "host=h password=*** dbname=x"),
        ("a cookie: yes", "a cookie: yes"),
        ("Bearer securities are Basic understanding", "Bearer securities are Basic understanding"),
    ],
)
def test_passwords_in_urls_may_hold_any_character(url, left):
    assert hide(f"see {url}, or not") == f"see {left}, or not"


def test_the_parts_of_what_the_environment_holds_are_secrets_too():
    environment = {
        "HTTPS_PROXY": "http://me:proxy-pass@host:3128",
        "AUTHORIZATION": "Bearer sk-4711-abcdef",
        "HOME": "/x",
    }
    assert secrets_of(None, environment) == {"proxy-pass", "Bearer sk-4711-abcdef", "sk-4711-abcdef"}


NESTED = f"""
api_key = 4711471147
password = 471147
[rewards.right.options.credentials]
user = "{CANARY}-user"
more = [{{ a = "{CANARY}-inner" }}]
[rewards.right.options.headers]
pairs = [["X-Api-Key", "{CANARY}-pair"], ["Accept", "text/html"]]
tables = [{{ name = "X-Api-Key", value = "{CANARY}-table" }}, {{ name = "Accept", value = "text/plain" }}]
"""


def test_secrets_in_nested_options_are_in_no_file(run, tmp_path):
    """A table under a secret's name, headers as pairs and as tables, and passwords that are numbers."""
    said = "raise RuntimeError(f'401 {options}')"
    reward = REWARD.replace("answer, api_key, endpoint, **_", "answer, **options").replace(
        'api_key.startswith("canary") and ', ""
    )
    reward = reward.replace('"password" in endpoint and ', "").replace("print(api_key)", "print(options)")
    assert "api_key" not in reward

    def nested(text):
        (tmp_path / "mine.py").write_text(reward.replace("BODY", said))
        return text.replace(OPTIONS, f"[rewards.right.options]{NESTED}")

    _, text = run(change=nested)
    assert "401" in text, "the reward has raised with all of its options"
    assert CANARY not in text and "4711" not in text
    options = read_config_text(tmp_path)["rewards"]["right"]["options"]
    assert options["headers"]["pairs"] == [["X-Api-Key", "***"], ["Accept", "text/html"]]
    assert options["headers"]["tables"][1] == {"name": "Accept", "value": "text/plain"}


def test_a_table_is_secret_by_its_name_within_options_alone():
    """A reward may be called secret_santa, and a number that is the id of a token is none."""
    settings = {"rewards": {"secret_santa": {"function": "a.py:f", "options": {"sep_token": 151643, "auth": True}}}}
    assert hide_settings(settings) == settings and secrets_of(settings, {}) == frozenset()


def test_a_secret_inside_another_option_is_in_no_file(run, tmp_path):
    """`header = "Bearer ..."` holds the value of a variable that is a secret by its name."""
    status, text = run(change=lambda text: text + f'header = "Bearer {CANARY}-environment"\n')
    assert status == 0, text
    assert read_config_text(tmp_path)["rewards"]["right"]["options"]["header"] == "Bearer ***"
    assert CANARY not in text


def test_what_a_reward_raises_cannot_drive_the_terminal(run):
    status, text = run("raise RuntimeError('\\x1b]52;c;aGk=\\x07' + completions[0])")
    assert status == 1 and r"\x1b]52" in text
    assert "\x1b" not in text and "\x07" not in text
