"""What verl's own command lacks on CPU: a platform, a rollout, and three repairs. An external module of verl.

VERL_USE_EXTERNAL_MODULES=verl_end_to_end,gvpo_verl python -m verl.trainer.main_ppo ...
"""

import contextlib
import os
from typing import Any

import verl_cpu  # first: it registers the platform that verl asks for when it is imported

# isort: split
import ray
import torch
import verl.models.transformers.monkey_patch as monkey_patch
import verl.workers.engine.fsdp.transformer_impl as engine
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
from verl_server import Server

NAME = "transformers_cpu"


class Adapter(BaseRollout):
    """Sends the trained weights to the server of its rank."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **options: Any
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True

    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **options: Any) -> None:
        state = {name: tensor.detach().clone() for name, tensor in weights}
        await ray.get_actor(f"server_{self.replica_rank}").load.remote(state, global_steps)


class Replica(RolloutReplica):
    """One server."""

    async def launch_servers(self) -> None:
        path = self.model_config.get("local_path") or self.model_config["path"]
        options = {"num_cpus": 0, "name": f"server_{self.replica_rank}", "max_concurrency": self.max_concurrency}
        server = ray.remote(Server).options(**options).remote(path)
        self.servers, self._server_handle = [server], server
        self._server_address = f"127.0.0.1:{9000 + self.replica_rank}"  # not used: agents call the actor


def one_backend(backend: Any = None, *args: Any, **options: Any) -> Any:
    """verl asks for "cpu:gloo,cpu:gloo" where the device is the CPU."""
    if isinstance(backend, str) and ":" in backend:
        backend = ",".join(dict.fromkeys(backend.split(",")))
    return plain(backend, *args, **options)


verl_cpu.CPU.nvtx_range = lambda self, msg: contextlib.nullcontext()
verl_cpu.register_engine()
base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
plain = torch.distributed.init_process_group
torch.distributed.init_process_group = one_backend
monkey_patch.is_trl_available = lambda: False  # TRL 1.16 has no value head, which verl looks for
if hasattr(engine, "CPUOffloadPolicy"):
    engine.CPUOffloadPolicy = lambda *args, **options: None  # pins memory, which needs a GPU
