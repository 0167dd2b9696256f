"""Starts a command in several processes that JAX joins, on CPU: python jax_processes.py COUNT COMMAND ..."""

import os
import socket
import subprocess
import sys


def start(count: int, command: list[str]) -> list["subprocess.Popen[bytes]"]:
    """The processes; the first one's output goes where ours goes, the others' errors too."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    started = []
    for number in range(count):
        env = os.environ | shared | {"JAX_PROCESS_ID": str(number), "RANK": str(number)}
        out = subprocess.DEVNULL if number else None
        started.append(subprocess.Popen(command, env=env, stdout=out))
    return started


def main() -> int:
    started = start(int(sys.argv[1]), sys.argv[2:])
    try:
        return max(abs(process.wait(240)) for process in started)
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
