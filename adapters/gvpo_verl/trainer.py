"""verl's synchronous trainer with checked settings and mini-batches of complete groups."""

from collections.abc import Sequence
from typing import Any

from omegaconf import open_dict
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from gvpo_verl.settings import check_settings
from gvpo_verl.worker import BETA


@register_trainer("gvpo")
class GVPOTrainer(PPOTrainerSync):
    """`trainer.v1.trainer_mode=gvpo`: verl's `sync` trainer. `GVPOWorker` computes the weights of its batches.

    Raises: ValueError: with these settings a step would not be GVPO's. RuntimeError: the workers have no GVPO.
    """

    def __init__(self, config: Any) -> None:
        self.gvpo_beta = check_settings(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl's sampler and agents check this
        super().__init__(config)

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], **named: Any) -> Any:
        batch = super()._balance_batch(batch, metrics, **named)
        config = self.config.actor_rollout_ref
        rows = config.actor.ppo_mini_batch_size * config.rollout.n
        if rows < len(batch):
            uids = [key.rsplit("_", 2)[0] for key in batch.keys]  # verl's keys: {uid}_{session}_{trajectory}
            ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
            batch.reorder(group_order(uids, [tag["seq_len"] for tag in batch.tags], rows, ranks))
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[BETA] = self.gvpo_beta
        batch = super()._update_actor(batch, metrics)
        if "actor/gvpo/loss" not in metrics:
            raise RuntimeError(
                "the actor's workers took a step without GVPO: gvpo_verl was not imported in their processes; set"
                " VERL_USE_EXTERNAL_MODULES=gvpo_verl there (ray_kwargs.ray_init.runtime_env.env_vars)"
            )
        if not metrics["actor/gvpo/groups/counted"]:
            raise RuntimeError("no group of this rollout has two responses with a score: check the reward function")
        return batch


def group_order(uids: Sequence[str], lengths: Sequence[int], mini_batch: int, ranks: int) -> list[int]:
    """Orders rows so that each mini-batch has complete groups, as far as their sizes allow.

    verl gives each rank an equal number of consecutive rows and cuts them into mini-batches. If groups of unequal size
    do not fill a mini-batch, one group is cut, and its parts count as separate groups (Cor. 3.4).

    Args:
      uids: group of each row.
      lengths: tokens of each row. A mini-batch's rows are dealt to the ranks longest first.
      mini_batch: rows of a mini-batch over all ranks. It divides the number of rows, and `ranks` divides it.
    Returns: row numbers, rank by rank.
    """
    members: dict[str, list[int]] = {}
    for row, uid in enumerate(uids):
        members.setdefault(uid, []).append(row)
    groups = sorted(members.values(), key=len, reverse=True)
    of_rank: list[list[int]] = [[] for _ in range(ranks)]
    for _ in range(len(uids) // mini_batch):
        chosen: list[int] = []
        for group in [group for group in groups if len(group) <= mini_batch]:
            if len(chosen) + len(group) <= mini_batch:
                chosen += group
                groups.remove(group)
        while len(chosen) < mini_batch:
            group = groups[-1]
            space = mini_batch - len(chosen)
            chosen += group[:space]
            if not (rest := group[space:]):
                groups.pop()
            else:
                groups[-1] = rest
        chosen.sort(key=lambda row: -lengths[row])
        for place, row in enumerate(chosen):  # back and forth over the ranks, which balances their total lengths
            turn, at = divmod(place, ranks)
            of_rank[at if turn % 2 == 0 else ranks - 1 - at].append(row)
    return [row for rows in of_rank for row in rows]
