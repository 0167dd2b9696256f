"""Compiles the JAX trainer's programs for TPUs ahead of time, without a TPU, and prints the memory that they need.

    python benchmarks/tpu_compile.py [CASE ...]

Proves that the programs compile for the chip and fit its memory together with their arguments. Says nothing about speed
or numerical results. `moved` is the traffic between the chips, from the program's HLO. The programs are those of a
training step (scores; forward and backward of complete groups; both in one program if the scores are known; AdamW) and
of generation. `beside` is what a run holds in addition to a program's arguments: AdamW's moments, the gradient's sum
during `forward`, the reference, and what `forward` keeps for `backward`.
Exit status 1 if a program exceeds its bound.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",  # only the compiler knows about TPUs
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance" / "support"))
import jax
import jax.numpy as jnp
import numpy as np
from collectives import collectives, total
from gvpo_jax import blocks, decoding, mesh, placement, update
from gvpo_jax.families import read_spec
from gvpo_jax.model import Setup
from gvpo_jax.programs import compile_program
from gvpo_jax.spec import Spec, is_linear
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

MEMORY = {"v5e": 16 * 2**30}  # bytes per chip, from Google's page about the v5e
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


# GiB that the collectives of a program move; for `decode`, per token.
SMOLLM2_MOVED = {"score_rows": 0.265, "forward": 0.265, "backward": 0.705, "accumulate": 0.97, "placed": 0.29}
QWEN_7B_MOVED = {"score_rows": 4.6, "forward": 4.6, "backward": 15.9, "accumulate": 20.5, "placed": 5.1}
QWEN_7B_MOVED |= {"prefill": 0.45, "decode": 0.0195}
SCALARS = 0.001  # bound for a program that moves only scalars


@dataclass(frozen=True)
class Case:
    """A model on a slice, with the sizes of one micro-batch and one generation, and bounds per chip."""

    model: dict[str, Any]
    chip: str
    topology: str
    fsdp: int
    tensor: int
    rows: int  # per micro-batch
    length: int  # tokens per row
    predicted: int  # tokens per row that need log-probs
    groups: int  # prompts per generation
    responses: int  # per prompt
    prompt: int  # tokens
    new: int  # tokens
    bound: float  # GiB per chip: the largest program with everything held beside it
    moved: Mapping[str, float] = field(default_factory=dict)  # GiB, for programs that move more than SCALARS
    lora_rank: int = 0
    attention: float = 1.1  # bound: temporaries of `accumulate` with attention kernels / without


# Bounds: 1.15 times what was measured.
CASES = {
    "smollm2-v5e-1x1": Case(SMOLLM2, "v5e", "v5e:1x1", 1, 1, 16, 512, 384, 8, 8, 128, 256, 4.1),
    "smollm2-lora-v5e-1x1": Case(SMOLLM2, "v5e", "v5e:1x1", 1, 1, 16, 512, 384, 8, 8, 128, 256, 1.0, lora_rank=16),
    "smollm2-v5e-2x2": Case(SMOLLM2, "v5e", "v5e:2x2", 2, 1, 16, 512, 384, 8, 8, 128, 256, 1.95, SMOLLM2_MOVED),
    "qwen2.5-7b-v5e-4x4": Case(QWEN_7B, "v5e", "v5e:4x4", 16, 1, 16, 1024, 768, 16, 8, 256, 512, 13.1, QWEN_7B_MOVED),
}
WITHOUT = "no kernels"  # `accumulate` without the attention kernels
_KERNELS = {"gvpo_flash", "gvpo_flash_queries", "gvpo_flash_keys"}
ATTENTION = {"score_rows": {"gvpo_flash"}, "forward": {"gvpo_flash"}, "backward": _KERNELS, "accumulate": _KERNELS}
ADAM = (0.9, 0.999, 1e-8)
LORA_SCALE = 2.0


def make_mesh(case: Case) -> Mesh:
    options = {"chips_per_host_bounds": [1, 1, 1]} if case.topology.endswith("1x1") else {}
    devices = np.asarray(topologies.get_topology_desc(case.topology, "tpu", **options).devices)
    shape = (devices.size // (case.fsdp * case.tensor), case.fsdp, case.tensor)
    return Mesh(devices.reshape(shape), mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def abstract(shapes: Mapping[str, tuple[int, ...]], on: Mesh, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.parameter_sharding(on, name, shape))
        for name, shape in shapes.items()
    }


def adapter_shapes(spec: Spec, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of LoRA on every linear layer; see `adapters.make_adapters`."""
    shapes = {}
    for name, (layers, outputs, inputs) in ((n, s) for n, s in spec.shapes().items() if is_linear(n)):
        module = name.removesuffix(".weight")
        shapes |= {f"{module}.lora_A": (layers, rank, inputs), f"{module}.lora_B": (layers, outputs, rank)}
    return shapes


def held(*trees: Any) -> int:
    """Returns the bytes of arrays per chip."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(trees))


def of_batch(on: Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32, axis: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.batch_sharding(on, axis))


def programs(case: Case) -> Iterator[tuple[str, Any, int]]:
    """Yields each program of a training step and of generation: name, compiled program, bytes per chip held beside it.

    `accumulate` comes a second time without the attention kernels, for comparison.
    """
    on, spec = make_mesh(case), read_spec(case.model)
    setup = Setup(spec, on, "bfloat16", remat=True, scale=LORA_SCALE if case.lora_rank else 0.0, in_blocks=True)
    parameters = abstract(spec.shapes(), on, jnp.bfloat16 if case.lora_rank else jnp.float32)
    adapters = abstract(adapter_shapes(spec, case.lora_rank), on, jnp.float32) if case.lora_rank else {}
    trained, frozen = (adapters, parameters) if case.lora_rank else (parameters, {})
    reference = {} if case.lora_rank else abstract(spec.shapes(), on, jnp.bfloat16)
    shardings = {name: a.sharding for name, a in trained.items()}
    single = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=mesh.replicated(on))
    b, t, p = case.rows, case.length, case.predicted
    arrays = dict.fromkeys(("ids", "positions", "segments", "last"), (b, t)) | dict.fromkeys(
        ("predict", "targets"), (b, p)
    )
    rows = {name: of_batch(on, shape) for name, shape in arrays.items()}
    state = jax.eval_shape(update.no_moments, trained)._replace(count=single(jnp.int32), mu=trained, nu=trained)
    state_out = jax.tree.map(lambda a: a.sharding, state)
    g, k, s = case.groups, case.responses, case.prompt
    beside = held(state, reference)
    scored = compile_program(update.score_rows, (setup,), parameters, adapters, rows, out=mesh.batch_sharding(on))
    yield "score_rows", scored, beside
    forward = compile_program(update.forward, (setup,), trained, frozen, rows)
    yield "forward", forward, beside + held(trained)
    _, saved = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        forward.out_info,
        forward.output_shardings,
    )
    arguments = (trained, saved, trained, frozen, rows, of_batch(on, (b, p), jnp.float32))
    yield "backward", compile_program(update.backward, (), *arguments, donate=(0,), out=shardings), beside
    operands = (trained, trained, frozen, rows, of_batch(on, (b, p), jnp.float32))
    accumulate = compile_program(update.accumulate, (setup,), *operands, donate=(0,), out=shardings)
    yield "accumulate", accumulate, beside
    plain = (replace(setup, in_blocks=False),)
    yield WITHOUT, compile_program(update.accumulate, plain, *operands, donate=(0,), out=shardings), beside
    numbers = dict.fromkeys(update.adamw_numbers(0.9, 0.9, 0.0, 1.0, 1.0, 0), single(jnp.float32))
    step = compile_program(
        update.step, ADAM, trained, state, trained, numbers, donate=(0, 1), out=(shardings, state_out)
    )
    yield "step", step, held(reference, frozen)
    sampling = placement.sampling_setup(setup, MEMORY[case.chip] // 4)
    on = sampling.mesh
    out = tuple(mesh.parameter_shardings(on, {n: a.shape for n, a in tree.items()}) for tree in (parameters, adapters))
    place = compile_program(placement.placed, (sampling,), parameters, adapters, out=out)
    yield "placed", place, beside
    parameters, adapters = (
        {n: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=shardings[n]) for n, a in tree.items()}
        for tree, shardings in zip((parameters, adapters), out, strict=True)
    )
    beside += 0 if case.lora_rank else held(trained)  # the trained parameters stay in place
    prompts = (of_batch(on, (g, s)), of_batch(on, (g,)))
    prefill = compile_program(decoding.prefill, (sampling,), parameters, adapters, *prompts)
    yield "prefill", prefill, beside
    made, after = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        prefill.out_info,
        prefill.output_shardings,
    )
    single = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=mesh.replicated(on))
    settings = {
        name: single(jnp.int32 if name in ("limit", "top_k") else jnp.float32)
        for name in ("temperature", "limit", "top_k", "min_p", "top_p")
    }
    decode = compile_program(
        decoding.decode,
        (sampling, False, (), (0,)),
        parameters,
        adapters,
        made,
        after,
        of_batch(on, (g,)),
        of_batch(on, (g, k), jnp.bool_),
        of_batch(on, (g, k, case.new), jnp.float32),
        settings,
    )
    yield "decode", decode, beside


def moved(program: str, of: Any, case: Case) -> float:
    """Returns the GiB that one run of a program moves between chips; for `decode`, per token of all rows."""
    token = program == "decode"
    moved_bytes = sum(total(collectives(of.as_text(), turn=token)).values()) / 2**30
    return moved_bytes / len(decoding.filled_sizes(case.new)) if token else moved_bytes


def kernels(of: Any) -> set[str]:
    """Returns the names of the Pallas kernels in a compiled program."""
    return set(re.findall(r"gvpo_flash\w*", of.as_text()))


def examine(name: str, case: Case) -> bool:
    """Prints the case's table. Returns whether every program is within its bound."""
    start = time.monotonic()
    chips = make_mesh(case).size
    training = f"LoRA of rank {case.lora_rank}" if case.lora_rank else "full fine-tuning"
    print(f"\n{name}: {chips} x {case.chip}, {training}, {case.rows} rows of {case.length} tokens, bfloat16, remat")
    columns = ("arguments", "output", "temporary", "beside", "together", "of a chip", "moved")
    print(f"{'program':<12} {' '.join(f'{column:>10}' for column in columns)}  GiB per chip", flush=True)
    good, temporary = True, {}
    for program, of, beside in programs(case):
        m = of.memory_analysis()
        output = m.output_size_in_bytes - m.alias_size_in_bytes  # donated arguments become output in place
        numbers = [m.argument_size_in_bytes, output, m.temp_size_in_bytes, beside]
        temporary[program] = m.temp_size_in_bytes
        together = sum(numbers)
        crossing = moved(program, of, case)
        fits = together <= min(case.bound * 2**30, MEMORY[case.chip]) and crossing <= case.moved.get(program, SCALARS)
        fits |= program == WITHOUT
        if program in ATTENTION and blocks.fits(make_mesh(case), case.rows, case.length):
            fits &= ATTENTION[program] <= kernels(of)
        good &= fits
        shown = " ".join(f"{n / 2**30:>10.2f}" for n in (*numbers, together))
        end = "" if fits else "  BEYOND ITS BOUND"
        print(f"{program:<12} {shown} {together / MEMORY[case.chip]:>10.0%} {crossing:>10.4f}{end}", flush=True)
    full = case.rows * case.predicted * case.model["vocab_size"] * 4 / chips
    print(f"full logits of the micro-batch would be {full / 2**30:.2f} GiB per chip, and their gradient as much again;")
    print(f"all temporaries of forward and backward in one loop are {temporary['accumulate'] / 2**30:.2f}")
    share = temporary["accumulate"] / temporary[WITHOUT]
    end = "" if share <= case.attention else "  BEYOND ITS BOUND"
    good &= not end
    print(f"with the attention kernels they are {share:.2f} of those without, bound {case.attention}{end}")
    print(f"{len(temporary) - 1} programs, bound {case.bound} GiB, {time.monotonic() - start:.0f} s", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the JAX trainer for TPUs without one.")
    parser.add_argument("cases", nargs="*", help=f"default all: {', '.join(CASES)}")
    names = parser.parse_args().cases or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    results = [examine(name, CASES[name]) for name in names]  # all cases, even after a failure
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
