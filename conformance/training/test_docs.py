"""The docs: Python blocks run, commands and settings are read by the real readers, links and anchors resolve."""

import ast
import importlib.util
import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gvpo_core.training.cli import main
from gvpo_core.training.config import suggestions
from gvpo_core.training.config.file import parse_arguments, read_config
from gvpo_core.training.policy import Response
from gvpo_core.training.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]}
LONGEST = 200  # lines of a page

REQUIRED = {  # what a block of some sections leaves to the rest of the config
    "[model]": '[model]\npath = "model"\n',
    "[data]": '[data]\ntrain = "train.jsonl"\n',
    "[rewards.": '[rewards.right]\nfunction = "exact_match"\n',
}
# (page, start of the block) -> why it is not run here.
ELSEWHERE = {
    ("engines.md", "import torch"): "conformance/backends/test_torch_batching.py trains with it",
    ("loops.md", "import numpy"): "a test of examples/ runs it",
    ("loops.md", "import torch"): "a test of examples/ runs it",
    ("loops.md", "import jax"): "a test of examples/ runs it",
    ("loops.md", "import mlx.core"): "a test of examples/ runs it",
    ("mlx_lm.md", "import mlx.optimizers"): "conformance/adapters/test_mlx_lm_trainer.py runs it",
    ("new_backend.md", ""): "conformance/training/test_new_backend.py runs the toy backend that the page describes",
}
PROMPTS = ("What is 2 + 3?", "What is 4 + 4?", "Write one line about the sea.", "Write one line about snow.")


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of each fenced block of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, block) for page, text in PAGES.items() for block in fence.findall(text)]


def runs_elsewhere(page: str, block: str) -> bool:
    return any(page == name and block.startswith(start) for name, start in ELSEWHERE)


PYTHON = [pair for pair in blocks("python") if not runs_elsewhere(*pair)]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the examples name: prompts, and models that are tables."""
    table = {prompt: {"5": 1.0, "8": 1.0, "long": 2.0} for prompt in PROMPTS}
    for folder in ("path/to/model", "path/to/a/huggingface/folder", "models/SmolLM2-135M-Instruct"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "table.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.core
@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_block_of_the_docs_runs(page, block, work, capsys):
    """The trainer's examples with the table policy and two steps."""
    if "import torch" in block and importlib.util.find_spec("torch") is None:
        pytest.skip("the block needs torch")
    code = re.sub(r"RunConfig\(", 'RunConfig(backend="table", ', re.sub(r"steps=\d+", "steps=2", block))
    code = re.sub(r", lora_rank=\d+", "", code)  # a table has no adapters
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    if "train(" in block and (folder := re.search(r'folder="([^"]+)"', block)):
        records = (work / folder[1] / "metrics.jsonl").read_text().splitlines()
        assert [r["step"] for r in map(json.loads, records) if r["kind"] == "train"] == [1, 2]


@pytest.mark.core
def test_every_exception_names_a_block_that_exists():
    for name, start in ELSEWHERE:
        assert any(page == name and block.startswith(start) for page, block in blocks("python")), (name, start)
    assert len(PYTHON) >= 8


@pytest.mark.core
def test_the_rewards_of_the_docs_score_text_and_chat():
    for page in ("README.md", "getting_started.md", "rewards.md"):
        names: dict = {}
        exec(next(block for name, block in PYTHON if name == page and block.startswith("def reward")), names)
        chat = [[{"role": "assistant", "content": "It is 5"}], [{"role": "assistant", "content": "15"}]]
        assert names["reward"](chat, ["5", "5"]) == names["reward"](["It is 5", "15"], ["5", "5"])
        assert names["reward"](["It is 5", "15"], ["5", "5"])[0] > names["reward"](["15"], ["5"])[0]


class _Engine(BaseHTTPRequestHandler):
    """A completions endpoint that takes and returns token ids."""

    asked: list[dict] = []  # noqa: RUF012  # of the class: the server makes a handler for each request

    def do_POST(self):
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        cut = body["max_tokens"] < 3
        ids = [*body["prompt"], 7, 2][: body["max_tokens"]]
        answer = {"choices": [{"token_ids": ids, "finish_reason": "length" if cut else "stop"}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        """Prints nothing."""


@pytest.mark.core
def test_the_endpoint_sampler_of_the_docs_draws_from_an_http_server():
    (block,) = [block for page, block in blocks("python") if page == "samplers.md"]
    names: dict = {}
    exec(block, names)
    server = HTTPServer(("127.0.0.1", 0), _Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Engine.asked.clear()
    try:
        sampler = names["Endpoint"](f"http://127.0.0.1:{server.server_port}", "tiny")
        drawn = sampler.generate([(4,), (5,)], [[1, 2**63 + 2], [3]], Sampling(max_tokens=3, temperature=0.7))
        (cut,) = sampler.generate([(4,)], [[1]], Sampling(max_tokens=2))
    finally:
        server.shutdown()
        server.server_close()
    assert drawn == [[Response((4, 7, 2), True)] * 2, [Response((5, 7, 2), True)]]
    assert cut == [Response((4, 7), False)]
    first, second = _Engine.asked[:2]
    assert first["prompt"] == [4] and first["temperature"] == 0.7 and first["model"] == "tiny"
    assert first["seed"] != second["seed"] and second["seed"] < 2**31


@pytest.mark.core
def test_train_takes_a_sampler_with_generate_alone(work, capsys):
    """What samplers.md says: no other method is called."""
    from gvpo_core.training import Config, ModelConfig, RolloutConfig, RunConfig, load_policy, train

    config = Config(
        run=RunConfig(folder="run", steps=2, backend="table"),
        model=ModelConfig(path="path/to/model"),
        rollout=RolloutConfig(prompts=1, responses=2, max_tokens=2),
    )

    class Sampler:
        def generate(self, prompts, seeds, sampling):
            return [[Response((1 + i % 2, 0), True) for i in range(len(row))] for row in seeds]

    rewards = {"five": lambda completions: [float(c == "5") for c in completions]}
    policy = load_policy(config)
    train(config, policy, train_rows=[{"prompt": PROMPTS[0]}], rewards=rewards, sampler=Sampler())
    rows = [json.loads(line) for line in (work / "run/completions.jsonl").read_text().splitlines()]
    assert {row["response"] for row in rows} == {"5", "8"}


@pytest.mark.core
def test_toml_blocks_of_the_docs_are_settings(tmp_path):
    found = blocks("toml")
    assert {page for page, _ in found} >= {"README.md", "getting_started.md", "training.md", "choosing.md"}
    for number, (_, block) in enumerate(found):
        path = tmp_path / f"{number}.toml"
        missing = [section for header, section in REQUIRED.items() if header not in block]
        path.write_text("\n".join([block, *missing]), encoding="utf-8")
        read_config(path)


@pytest.mark.core
def test_json_blocks_of_the_docs_are_rows():
    for page, block in blocks("json"):
        for line in block.splitlines():
            assert isinstance(json.loads(line), dict), page


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each line that begins with `gvpo `, in any block without Python or settings."""
    fence = re.compile(r"^```(?:bash|console|)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    lines = [
        (page, line) for page, text in PAGES.items() for block in fence.findall(text) for line in block.split("\n")
    ]
    inline = [(page, c) for page, text in PAGES.items() for c in re.findall(r"`(gvpo train config\.toml [^`]+)`", text)]
    return [(page, shlex.split(line, comments=True)[1:]) for page, line in lines + inline if line.startswith("gvpo ")]


@pytest.mark.core
@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_command_of_the_docs_is_understood(page, words, work, capsys):
    command, *arguments = words
    if command == "collect":
        command, arguments = "train", [arguments[0], *arguments[2:]]
    if command == "train":
        pytest.importorskip("tyro")
        path = ROOT / arguments[0] if arguments[0].startswith("examples/") else work / "config.toml"
        if not path.exists():
            path.write_text("\n".join(REQUIRED.values()))
        if "--help" not in arguments:
            own = {"--dry-run": 0, "--from-step": 1}  # taken out before the settings are read
            for option, values in own.items():
                if option in arguments:
                    i = arguments.index(option)
                    del arguments[i : i + 1 + values]
            parse_arguments([str(path), *arguments[1:]])
            return
    elif command == "doctor":
        assert arguments in ([], ["--json"])
        return
    # Options are read before the run folder, which is missing here.
    try:
        status = main([command, *arguments])
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr()
    assert "unrecognized" not in said.err and "no command" not in said.err, said.err
    assert status == 0 or "is not a run folder" in said.err, said.err


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.core
def test_links_and_anchors_of_the_docs_resolve():
    count = 0
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            count += 1
            assert not path or (folder / path).exists(), f"{page} links to {target}"
            if anchor:
                linked = (folder / path).read_text(encoding="utf-8") if path else text
                assert anchor in anchors(linked), f"{page} links to {target}"
    assert count > 60


@pytest.mark.core
@pytest.mark.parametrize("page", PAGES)
def test_page_is_short(page):
    assert PAGES[page].count("\n") <= LONGEST


@pytest.mark.core
def test_the_site_shows_a_path_outside_docs_once():
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs/links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    shown = lambda text: links.on_page_markdown(text, config={"config_file_path": str(ROOT / "mkdocs.yml")})
    assert shown("see [`README.md`](../README.md).") == "see `README.md`."
    assert shown("see [README.md](../README.md).") == "see `README.md`."
    assert shown("see [the start](../README.md).") == "see the start (`README.md`)."
    with pytest.raises(FileNotFoundError, match=r"no_such\.md"):
        shown("[x](../no_such.md)")


def test_site_lists_every_page():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))


@pytest.mark.core
def test_names_of_other_trainers_in_the_docs_are_those_of_the_error_messages():
    section = PAGES["coming_from.md"].partition("## Names of settings")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", section, re.MULTILINE)
    assert {ours: tuple(re.findall(r"`(\w+)`", theirs)) for ours, theirs in rows} == suggestions.ELSEWHERE


@pytest.mark.core
def test_messages_of_the_faq_are_in_the_code():
    """Each message of faq.md's table occurs in the source, its variable parts aside."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("gvpo_core", "backends")
        for path in (ROOT / folder).rglob("*.py")
    ]
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    section = PAGES["faq.md"].partition("## Messages")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 12
    for message in messages:
        words = re.split(r" \.\.\. |'answer'|\bNAME\b|optimizer\.\w+\??|\btorch\b|\b2\b", message)
        parts = [part.strip() for part in words if len(part.strip()) > 3]
        assert any(all(part in text for part in parts) for text in texts), message


@pytest.mark.core
def test_defaults_in_the_docs_are_those_of_the_settings():
    from gvpo_core.training.config import Config

    rows = re.findall(r"^\| `(\w+)\.(\w+)`[^|]*\| ([\d.e-]+) \|", PAGES["choosing.md"], re.MULTILINE)
    assert len(rows) == 4
    for section, field, value in rows:
        assert getattr(getattr(Config(), section), field) == float(value), (section, field)


@pytest.mark.core
def test_api_pages_list_every_public_name():
    import gvpo

    pages = PAGES["api.md"] + PAGES["api_training.md"]
    listed = {name for names in re.findall(r"members: \[(.*)\]", pages) for name in names.split(", ")}
    assert listed == {*gvpo.__all__, "preview"} - {"__version__"}
