"""Exact GVPO in verl, off-policy and over many mini-batches too, as an external module: nothing of verl is changed.

VERL_USE_EXTERNAL_MODULES=gvpo_verl python -m verl.trainer.main_ppo trainer.v1.trainer_mode=gvpo ...

Importing it registers the trainer `gvpo` and sets the class of the actor's training worker, which acts on that
trainer's batches alone. Where every step is on-policy, verl's own settings are enough: docs/adapters.md.
"""

try:
    import verl  # noqa: F401
except ImportError as error:
    raise ImportError('gvpo_verl needs verl: pip install "gvpo[verl]"') from error

from gvpo_verl.settings import check_settings, check_version
from gvpo_verl.worker import GVPOWorker

check_version()

from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402

from gvpo_verl.trainer import GVPOTrainer  # noqa: E402

ActorRolloutRefWorker.actor_worker_cls = GVPOWorker

__all__ = ["GVPOTrainer", "GVPOWorker", "check_settings"]
