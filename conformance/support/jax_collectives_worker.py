"""Prints, as JSON, what crosses between 8 simulated devices in gvpo_jax's programs; started by
test_jax_collectives.py, since the number of devices is fixed when JAX starts.
"""

import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from collectives import collectives
from gvpo_jax import generate
from gvpo_jax import mesh as meshes
from gvpo_jax.families import read_spec
from gvpo_jax.logprobs import token_logprobs
from gvpo_jax.model import Setup
from gvpo_jax.placement import place, sampling_setup
from gvpo_jax.programs import Programs
from jax.sharding import AxisType, Mesh

from gvpo_core.training.sampling import Sampling

ROWS, LENGTH, VOCABULARY, HIDDEN = 8, 6, 48, 16


def mesh(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), meshes.AXES, axis_types=(AxisType.Auto,) * 3)


def head(over: Mesh, *, frozen: bool) -> dict[str, Any]:
    """The head's log-probs and their gradients in chunks of 2 tokens, beside those without a mesh."""
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(ROWS, LENGTH, HIDDEN)).astype(np.float32)
    weight = draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
    targets = draw.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    factors = draw.normal(size=(ROWS, LENGTH)).astype(np.float32)
    chunk = 2 * ROWS * VOCABULARY * 4

    def values_and_gradients(on: Mesh | None, *given: Any) -> Any:
        *learned, wanted, factor = given
        value = lambda h, w: token_logprobs(h, w, wanted, chunk_bytes=chunk, frozen=frozen, softcap=5.0, mesh=on)
        values, pull = jax.vjp(value, *learned)
        return values, pull(factor)

    own = meshes.parameter_sharding(over, "lm_head.weight", weight.shape)
    rows = meshes.batch_sharding(over)
    placed = [
        jax.device_put(a, s) for a, s in zip((hidden, weight, targets, factors), (rows, own, rows, rows), strict=True)
    ]
    program = jax.jit(lambda *a: values_and_gradients(over, *a), out_shardings=(rows, (rows, own)))
    compiled = program.lower(*placed).compile()
    split = jax.tree.leaves(compiled(*placed))
    alone = jax.tree.leaves(
        jax.jit(lambda *a: values_and_gradients(None, *a))(*map(jnp.asarray, (hidden, weight, targets, factors)))
    )
    apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(split, alone, strict=True))
    text = compiled.as_text()
    return {"apart": apart, "found": [asdict(c) for c in collectives(text)], "devices": over.size}


LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def decoding() -> dict[str, Any]:
    """Samples by one device, and by 8 that hold the parameters in 8 parts; what the placement and a token move."""
    spec, draw = read_spec(LLAMA), np.random.default_rng(0)
    values = {
        name: (draw.normal(size=shape) * (1.0 if len(shape) < 3 else 0.3)).astype(np.float32)
        for name, shape in spec.shapes().items()
    }
    size = sum(a.size for a in values.values()) * 4
    prompts = [tuple(draw.integers(1, 96, int(n)).tolist()) for n in (3, 9, 5, 12)]
    seeds = [[10 * i + j for j in range(4)] for i in range(4)]
    found: dict[str, Any] = {}
    for name, over in {
        "one": Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), meshes.AXES),
        "many": mesh(1, 8, 1),
    }.items():
        setup, programs = Setup(spec, over, "float32"), Programs()
        shardings = meshes.parameter_shardings(over, spec.shapes())
        parameters = {n: jax.device_put(a, shardings[n]) for n, a in values.items()}
        sampling = sampling_setup(setup, size // 2)
        placed, _ = place(sampling, programs, parameters, {})
        responses, sums = generate.generate(
            sampling, programs, placed, {}, prompts, seeds, Sampling(40), end=[0], cache_tokens=1 << 20
        )
        found[name] = {"tokens": [[r.tokens for r in row] for row in responses], "sums": sums}
        found[name]["mesh"] = dict(sampling.mesh.shape)
        found[name]["programs"] = {
            key[0].__name__: {
                "all": [asdict(c) for c in collectives(program.as_text())],
                "turn": [asdict(c) for c in collectives(program.as_text(), turn=True)],
            }
            for key, program in programs.used.items()
        }
    found["bytes"] = size
    return found


def main() -> None:
    found = {"decoding": decoding()}
    for name, shape in {"fsdp": (1, 8, 1), "all": (2, 2, 2)}.items():
        for frozen in (False, True):
            found[f"{name}-{'frozen' if frozen else 'trained'}"] = head(mesh(*shape), frozen=frozen)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
