"""Takes GVPO steps with mlx-lm's trainer on however many processes it runs in; the first writes the changes.

python mlx_lm_worker.py MODEL_FOLDER OUT.npz
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from gvpo_mlx_lm import load_groups, train
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm_model import BETA, RATE, adapted, parameters, scored_rows

# case -> (groups, batch_size over all processes, accumulation)
CASES = {"whole": (4, 10, 2), "split": (4, 4, 4), "idle": (1, 8, 1)}


def main(folder: Path, out: str) -> None:
    world = mx.distributed.init()
    found: dict[str, np.ndarray] = {"world": np.asarray(world.size())}
    for case, (groups, batch_size, accumulation) in CASES.items():
        model = adapted(folder)
        before = parameters(model)
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArgs(
                batch_size=batch_size,
                iters=2 * accumulation,
                grad_accumulation_steps=accumulation,
                adapter_file=str(Path(scratch) / "adapters.safetensors"),
            )
            chosen = load_groups(scored_rows()[:groups], tokenizer(folder))
            train(model, optim.SGD(learning_rate=RATE), chosen, chosen, args=args, model_path=folder, beta=BETA)
        found |= {
            f"{case}/{name}": np.array(p) - before[name] for name, p in tree_flatten(model.trainable_parameters())
        }
    if world.rank() == 0:
        np.savez(out, **found)


def tokenizer(folder: Path):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
