"""The example's adapter plays episodes against a real OpenEnv server."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import toy_run
from places import ROOT, SUPPORT
from required import require
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training.config import EnvironmentConfig

require("openenv", subject="openenv")


@pytest.fixture
def url():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(SUPPORT / "openenv_server.py"), str(port)], env=os.environ)
    try:
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_episodes_are_played_on_a_server(url, tmp_path) -> None:
    def script(text: str, u: float) -> str:
        last = text.rpartition("<user>")[2]
        return "7" if "higher" in last and u < 0.6 else "3" if "lower" in last and u < 0.6 else "5"

    config = toy_run.config_of(tmp_path / "run", "scripted", 1, rollout={"max_tokens": 60})
    config = replace(
        config,
        environment=EnvironmentConfig(
            path=f"{ROOT}/examples/openenv/environment.py:OpenEnv", options={"url": url}, max_turns=3, memory=0.0
        ),
    )
    toy_run.run(config, [{"reset": {"secret": 3}}, {"reset": {"secret": 7}}], ScriptedPolicy(script))
    written = records(tmp_path / "run", "completions")
    assert len(written) == 8 and {c["end"] for c in written} == {"done", "turns"}
    for c in written:
        said = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        won = said[-1] == str([3, 7][c["row"]])
        assert c["finished"] == won and c["reward"] == pytest.approx(won - 0.1 * (len(said) - won))
