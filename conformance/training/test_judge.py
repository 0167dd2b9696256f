"""The reward `judge` against an HTTP endpoint: grades, and what becomes of an answer without one."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai", reason="openai is not installed")

from gvpo_core.training.config import Config, RewardConfig
from gvpo_core.training.rewards import load_rewards
from gvpo_core.training.rewards.scores import call_rewards
from gvpo_core.training.rewards.worker import judge as judging
from gvpo_core.training.rewards.worker.cache import cache_of

pytestmark = pytest.mark.core


class Endpoint(ThreadingHTTPServer):
    """Grades by the first character of the response; fails where told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.broken = 0  # next requests that get 500
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Endpoint = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.asked.append(request)
        server.keys.append(self.headers.get("authorization"))
        text = request["messages"][0]["content"]
        answer = text.split("<answer>\n")[-1].split("\n</answer>")[0] if "<answer>" in text else text
        if server.broken > 0 or answer.startswith("x"):
            server.broken -= 1
            self.send_response(500)
            self.end_headers()
            return
        said = "I cannot say." if answer.startswith("?") else f"Score: 9? No. Thinking.\nScore: {answer[0]}"
        message = {"role": "assistant", "content": said}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        body |= {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fresh_cache():
    cache_of.cache_clear()


def grades(server, completions, prompts=None, **options):
    options = {"model": "m", "url": server.url, "retries": 0} | options
    return asyncio.run(judging.judge(prompts or ["q"] * len(completions), completions, **options))


def test_grades_are_on_the_scale_and_failures_are_none_never_zero(endpoint, capsys):
    got = grades(endpoint, ["1 worst", "5 fair", "9 good", "? none", "x fails", "0 below the scale"])
    assert got == [0.0, pytest.approx(4 / 9), pytest.approx(8 / 9), None, None, None]
    said = capsys.readouterr().out
    assert "judge: 1 responses have no grade: no grade from 1 to 10" in said and "InternalServerError" in said


def test_the_request_has_every_field(endpoint):
    chat = [{"role": "user", "content": "How much is {response}?"}]
    grades(endpoint, [[{"role": "assistant", "content": "7 {lowest}"}]], [chat], key="secret", max_tokens=55)
    (request,) = endpoint.asked
    text = request["messages"][0]["content"]
    assert "user: How much is {response}?" in text, "fields in the data stay as they are"
    assert "7 {lowest}" in text and "from 1 (worst) to 10 (best)" in text
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 55)
    assert endpoint.keys == ["Bearer secret"]


def test_a_text_is_paid_for_once(endpoint, tmp_path):
    cache = tmp_path / "grades" / "judge.jsonl"
    first = grades(endpoint, ["3 a", "3 a", "4 b", "? c"], cache=str(cache))
    assert len(endpoint.asked) == 3 and first[:3] == [first[0]] * 2 + [first[2]]
    cache_of.cache_clear()  # as another process
    with cache.open("ab") as f:
        f.write(b'{"key": "cut by a ki')
    assert grades(endpoint, ["4 b", "3 a"], cache=str(cache)) == [first[2], first[0]]
    assert len(endpoint.asked) == 3
    grades(endpoint, ["3 a"], cache=str(cache), model="other")
    grades(endpoint, ["? c"], cache=str(cache))
    assert len(endpoint.asked) == 5, "another judge, and an answer that had no grade"
    cache_of.cache_clear()
    grades(endpoint, ["3 a", "4 b"], cache=str(cache), model="other")
    assert len(endpoint.asked) == 6, "lines behind a cut one are read"


def test_a_request_that_fails_once_is_tried_again(endpoint):
    endpoint.broken = 1
    assert grades(endpoint, ["5"], retries=2) == [pytest.approx(4 / 9)]


def test_a_template_and_a_pattern_of_your_own(endpoint):
    template, pattern = "{answer} against {response}: yes or no", r"(yes|\d)"
    got = grades(endpoint, ["b"], template=template, pattern=pattern, answer=["2"], lowest=0, highest=4)
    assert got == [pytest.approx(0.5)] and endpoint.asked[0]["messages"][0]["content"].startswith("2 against b")
    with pytest.raises(LookupError, match=r"options\.template has \{gold\}; expected any of highest, lowest, prompt"):
        grades(endpoint, ["b"], template="{gold}")
    with pytest.raises(LookupError, match=r"options\.highest = 1\.0; expected more than options\.lowest"):
        grades(endpoint, ["b"], highest=1.0)


def test_a_column_never_takes_the_place_of_what_is_judged(endpoint):
    """Real data has columns such as prompt and response; the judge reads the response and its own scale."""
    columns = {"prompt": ["c"], "response": ["9 of the data"], "lowest": [0], "highest": [100]}
    config = Config(rewards={"judge": RewardConfig(function="judge", options={"model": "m", "url": endpoint.url})})
    rewards = load_rewards(config.rewards, None)
    try:
        scores = call_rewards(rewards, ["the question"], ["2"], columns)
        assert list(scores.parts["judge"]) == [pytest.approx(1 / 9)]
    finally:
        for reward in rewards:
            reward.call.close()
    text = endpoint.asked[0]["messages"][0]["content"]
    assert "the question" in text and "of the data" not in text and "from 1 (worst) to 10 (best)" in text


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("Score: 10", 1.0),
        ("**Score:** 4", 1 / 3),
        ("score = 5.5", 0.5),
        ("Score: 11", None),
        ("7/10", None),
        ("", None),
    ],
)
def test_grade(said, want):
    got = judging.grade(said, judging.re.compile(judging.PATTERN), 1, 10)
    assert got == (want if want is None else pytest.approx(want))


@pytest.mark.slow
def test_a_judge_in_its_process_takes_no_setting_from_a_column(endpoint, monkeypatch):
    """The key comes from the environment; columns named as settings stay columns."""
    monkeypatch.setenv("JUDGE_TOKEN", "from-the-environment")
    options = {"model": "m", "url": endpoint.url, "key": "$JUDGE_TOKEN", "retries": 0}
    config = Config(rewards={"judge": RewardConfig(function="judge", options=options, workers=1)})
    rewards = load_rewards(config.rewards, None)
    try:
        columns = {"key": ["of the data"] * 2, "pattern": ["p"] * 2, "answer": ["a"] * 2}
        scores = call_rewards(rewards, ["q", "q"], ["2", "3"], columns)
        assert list(scores.parts["judge"]) == [pytest.approx(1 / 9), pytest.approx(2 / 9)]
    finally:
        for reward in rewards:
            reward.call.close()
    assert endpoint.keys == ["Bearer from-the-environment"] * 2
