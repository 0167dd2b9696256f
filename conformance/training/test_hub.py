"""A hub that answers with errors, or not at all, while a model is downloaded: one line, and soon."""

import time

import pytest
from fake_hub import Hub

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.files import hub
from gvpo_core.training.policy import hugging_face

pytestmark = pytest.mark.core
huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


@pytest.fixture
def downloaded(monkeypatch, tmp_path):
    """Downloads org/tiny from a hub with a fault."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_SECONDS", 0.5)

    def download(fault):
        with Hub(fault) as server:
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            hugging_face._downloaded.cache_clear()
            try:
                return hugging_face.local_folder(ModelConfig(path="org/tiny"))
            finally:
                assert server.asked, "nobody asked this hub"

    yield download
    hugging_face._downloaded.cache_clear()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (401, "401 Unauthorized.*; a private or gated model needs HF_TOKEN"),
        ("gated", "a private or gated model needs HF_TOKEN"),
        (404, "404"),
        (429, "429 Too Many Requests"),
        (500, "500 Internal Server Error"),
        ("page", "the hub cannot be reached: JSONDecodeError"),
        ("reset", "the hub cannot be reached: ReadError"),
        ("hang", "the hub cannot be reached: ReadTimeout"),
    ],
)
def test_a_hub_with_faults_is_one_line(fault, said, downloaded):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=said) as raised:
        downloaded(fault)
    message = str(raised.value)
    assert message.startswith("model.path 'org/tiny'") and "\n" not in message and time.monotonic() - start < 30


@pytest.mark.parametrize("fault", ["hang", "reset", "page"])
def test_what_was_downloaded_before_is_used(fault, downloaded, monkeypatch, tmp_path):
    asked = []

    def download(name, *, local_files_only, **options):
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert downloaded(fault) == tmp_path and asked == [True]


def test_an_error_of_the_http_client_within_a_file_is_one_line(downloaded, monkeypatch):
    class Cut(Exception):
        """As its client's errors, which are of no kind of Python's own."""

    def download(name, **options):
        raise Cut("peer closed connection without sending the whole message\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"cannot be downloaded: Cut: peer closed connection .* message$"):
        downloaded(500)
