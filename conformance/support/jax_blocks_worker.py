"""Prints how far the attention kernels over meshes of 8 simulated devices are from one device without them, as JSON:
of the result and of the gradients by q, k and v, each relative to its largest number."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from gvpo_jax import blocks, mesh
from gvpo_jax.model import attention
from jax.sharding import AxisType
from packed_attention import row

ROWS = [row([(60, [80, (30, 20)]), (30, [30])], 256), row([(200, [10])], 256)]
MESHES = {"rows and heads": (1, 2, 2), "more parts than heads of keys": (2, 1, 4), "parts that no heads fit": (1, 1, 3)}


def make(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, mesh.AXES, axis_types=(AxisType.Auto,) * 3)


def main() -> None:
    segments, last, positions, _ = (jnp.asarray(np.stack(x)) for x in zip(*ROWS, strict=True))
    draw = np.random.default_rng(0)
    q, k, v, above = (jnp.asarray(draw.normal(size=(2, 256, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    real = (segments >= 0)[:, :, None, None]  # what padding sees is nobody's concern
    above = jnp.where(real, above, 0)
    window, given = jnp.int32(2**30), {"scale": 0.3, "cap": None, "windowed": False}

    def plain(*qkv):
        spec = SimpleNamespace(attention_scale=0.3, attention_cap=None)
        setup = SimpleNamespace(mesh=make((1, 1, 1)), spec=spec, in_blocks=False)
        return attention(setup, *qkv, positions, segments, last, window)

    found = {}
    out, pull = jax.vjp(jax.jit(plain), q, k, v)
    wanted = [np.asarray(x) for x in (jnp.where(real, out, 0), *pull(above))]
    for name, shape in MESHES.items():
        on = make(shape)
        assert blocks.fits(on, *segments.shape), name

        def kernel(*qkv, on=on):
            return blocks.attend(on, *qkv, positions, segments, last, window, **given)

        out, pull = jax.vjp(jax.jit(kernel), q, k, v)
        pairs = zip((jnp.where(real, out, 0), *pull(above)), wanted, strict=True)
        found[name] = [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
