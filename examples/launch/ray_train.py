"""A run on a Ray cluster with Ray Train: python examples/launch/ray_train.py config.toml --workers 8 [--cpu]

Ray Train starts the workers, gives each its device and connects them. gvpo uses their process group. All nodes must see
the run folder. If a worker dies, the attempt ends, and the next one resumes from the newest checkpoint.
"""

import argparse
import os
from pathlib import Path
from typing import Any


def work(settings: dict[str, Any]) -> None:
    """Runs in each worker."""
    import ray.train

    import gvpo
    from gvpo_core.training.config.file import read_config

    os.chdir(settings["folder"])  # Ray starts each worker in another folder
    config = read_config(Path(settings["config"]))
    result = gvpo.train(config, gvpo.load_policy(config))
    if result.exit_status:
        raise RuntimeError(f"the run ended with status {result.exit_status}")
    ray.train.report({"step": config.run.steps})


def main() -> None:
    import ray.train
    import ray.train.torch

    parser = argparse.ArgumentParser(description="Trains on a Ray cluster.")
    parser.add_argument("config", help="settings file of the run")
    parser.add_argument("--workers", type=int, default=1, help="processes, one per GPU")
    parser.add_argument("--cpu", action="store_true", help="use no GPUs")
    parser.add_argument("--tries", type=int, default=3, help="most attempts")
    options = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"config": os.path.abspath(options.config), "folder": os.getcwd()},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=options.tries - 1)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
