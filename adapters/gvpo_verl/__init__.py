"""Exact GVPO in verl as an external module, also off-policy and over many mini-batches. verl is not modified.

VERL_USE_EXTERNAL_MODULES=gvpo_verl python -m verl.trainer.main_ppo trainer.v1.trainer_mode=gvpo ...

Importing it registers the trainer `gvpo` and sets the class of the actor's training worker, which changes only that
trainer's batches. If every step is on-policy, verl's own settings are enough: docs/verl.md.
"""

from gvpo_core.hosts import Host

HOST = Host("gvpo_verl", "verl", "verl", "0.9", "0.10", "lack the methods that it overrides")
HOST.check()
try:
    import verl  # noqa: F401
except ImportError as error:
    raise HOST.missing(error) from error

from verl.workers.engine_workers import ActorRolloutRefWorker

from gvpo_verl.settings import check_settings
from gvpo_verl.trainer import GVPOTrainer
from gvpo_verl.worker import GVPOWorker

ActorRolloutRefWorker.actor_worker_cls = GVPOWorker

__all__ = ["GVPOTrainer", "GVPOWorker", "check_settings"]
