"""Compiles the JAX trainer's programs for TPUs, ahead of time and without one, and prints what they take of the memory.

    python benchmarks/tpu_compile.py [CASE ...]

Proves that the programs compile for the chip and fit its memory beside their arguments. Says nothing of speed or of
numbers. The programs are those of a training step (scores, forward and backward in one loop, AdamW) and of generation.
Exit status 1 where a program is beyond its bound.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",  # the compiler alone is asked for TPUs
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import numpy as np
from gvpo_jax import generate, mesh, update
from gvpo_jax.model import Setup, Spec, read_spec
from gvpo_jax.programs import compile_program
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

MEMORY = {"v5e": 16 * 2**30}  # bytes a chip, from Google's page of the v5e
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
}


@dataclass(frozen=True)
class Case:
    """A model on a slice, with the sizes of one micro-batch and one generation; bounds in bytes a chip."""

    model: dict[str, Any]
    chip: str
    topology: str
    fsdp: int
    tensor: int
    rows: int  # of a micro-batch
    length: int  # tokens a row
    predicted: int  # tokens a row whose log-probs are wanted
    groups: int  # prompts generated for at once
    responses: int  # a prompt
    prompt: int  # tokens
    new: int  # tokens
    bound: float  # GiB: arguments and temporaries of the largest program, a chip


CASES = {
    "smollm2-v5e-1x1": Case(SMOLLM2, "v5e", "v5e:1x1", 1, 1, 16, 512, 384, 8, 8, 128, 256, 8.0),
    "smollm2-v5e-2x2": Case(SMOLLM2, "v5e", "v5e:2x2", 2, 1, 16, 512, 384, 8, 8, 128, 256, 4.0),
    "qwen2.5-7b-v5e-4x4": Case(QWEN_7B, "v5e", "v5e:4x4", 16, 1, 16, 1024, 768, 16, 8, 256, 512, 15.5),
}
BFLOAT16_ADAM = (0.9, 0.999, 1e-8, 0.0)


def make_mesh(case: Case) -> Mesh:
    options = {"chips_per_host_bounds": [1, 1, 1]} if case.topology.endswith("1x1") else {}
    devices = np.asarray(topologies.get_topology_desc(case.topology, "tpu", **options).devices)
    shape = (devices.size // (case.fsdp * case.tensor), case.fsdp, case.tensor)
    return Mesh(devices.reshape(shape), mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def abstract(spec: Spec, on: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh.parameter_sharding(on, name, shape))
        for name, shape in spec.shapes().items()
    }


def of_batch(on: Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32, axis: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.batch_sharding(on, axis))


def programs(case: Case) -> dict[str, Any]:
    """Every program of a training step and of generation, compiled."""
    on, spec = make_mesh(case), read_spec(case.model)
    setup = Setup(spec, on, "bfloat16", remat=True)
    trained = abstract(spec, on)
    shardings = {name: a.sharding for name, a in trained.items()}
    single = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=mesh.replicated(on))
    b, t, p = case.rows, case.length, case.predicted
    arrays = dict.fromkeys(("ids", "positions", "segments"), (b, t)) | dict.fromkeys(("predict", "targets"), (b, p))
    rows = {name: of_batch(on, shape) for name, shape in arrays.items()}
    many = {name: of_batch(on, (1, *shape), axis=1) for name, shape in arrays.items()}
    state = jax.eval_shape(update.adamw(*BFLOAT16_ADAM).init, trained)
    adam = state[0]._replace(count=single(jnp.int32), mu=trained, nu=trained)
    state = (adam, *state[1:])
    state_out = jax.tree.map(lambda a: a.sharding, state)
    g, k, s = case.groups, case.responses, case.prompt
    found = {
        "score_rows": compile_program(update.score_rows, (setup,), trained, {}, rows, out=mesh.batch_sharding(on)),
        "accumulate": compile_program(
            update.accumulate,
            (setup,),
            trained,
            trained,
            {},
            many,
            of_batch(on, (1, b, p), jnp.float32, 1),
            single(jnp.int32),
            donate=(0,),
            out=(shardings, mesh.batch_sharding(on, 1)),
        ),
        "step": compile_program(
            update.step,
            BFLOAT16_ADAM,
            trained,
            state,
            trained,
            single(jnp.float32),
            single(jnp.float32),
            donate=(0, 1),
            out=(shardings, state_out),
        ),
        "prefill": compile_program(generate.prefill, (setup,), trained, {}, of_batch(on, (g, s)), of_batch(on, (g,))),
    }
    caches = [of_batch(on, (spec.layers, g, s, spec.key_heads, spec.width), jnp.bfloat16, 1)] * 2
    settings = {
        name: single(jnp.int32 if name in ("limit", "top_k") else jnp.float32)
        for name in ("temperature", "limit", "top_k", "min_p", "top_p")
    }
    found["decode"] = compile_program(
        generate.decode,
        (setup, False, (), (0,)),
        trained,
        {},
        *caches,
        of_batch(on, (g, spec.vocabulary), jnp.float32),
        of_batch(on, (g,)),
        of_batch(on, (g, k), jnp.bool_),
        of_batch(on, (g, k, case.new), jnp.float32),
        settings,
    )
    return found


def examine(name: str, case: Case) -> bool:
    """Prints the case's table; whether every program is within its bound."""
    start = time.monotonic()
    compiled = programs(case)
    chips = make_mesh(case).size
    print(f"\n{name}: {chips} x {case.chip}, {case.rows} rows of {case.length} tokens, bfloat16, remat")
    print(f"{'program':<12} {'arguments':>10} {'temporary':>10} {'together':>10} {'of a chip':>10}  GiB a chip")
    good = True
    for program, of in compiled.items():
        m = of.memory_analysis()
        # What is donated becomes output in place; other output is new.
        together = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        numbers = [m.argument_size_in_bytes, m.temp_size_in_bytes, together]
        fits = together <= min(case.bound * 2**30, MEMORY[case.chip])
        good &= fits
        shown = " ".join(f"{n / 2**30:>10.2f}" for n in numbers)
        print(f"{program:<12} {shown} {together / MEMORY[case.chip]:>9.0%}{'' if fits else '  BEYOND ITS BOUND'}")
    full = case.rows * case.predicted * case.model["vocab_size"] * 4 / chips
    temporary = compiled["accumulate"].memory_analysis().temp_size_in_bytes
    print(f"full logits of the micro-batch would be {full / 2**30:.2f} GiB a chip, and their gradient as much again;")
    print(f"all temporaries of forward and backward are {temporary / 2**30:.2f}")
    print(f"{len(compiled)} programs, bound {case.bound} GiB, {time.monotonic() - start:.0f} s")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the JAX trainer for TPUs without one.")
    parser.add_argument("cases", nargs="*", help=f"default all: {', '.join(CASES)}")
    names = parser.parse_args().cases or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    results = [examine(name, CASES[name]) for name in names]  # every case, also after one that failed
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
