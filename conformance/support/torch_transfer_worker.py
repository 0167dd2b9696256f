"""One of several processes that gather the tensors of one policy for a server.

python torch_transfer_worker.py FOLDER OUT SETTINGS_AS_JSON
"""

import json
import os
import sys
from pathlib import Path

from torch_policies import policy

folder, out, settings = sys.argv[1:]
of = policy(Path(folder), seed=3, **json.loads(settings))
assert of.world_size == int(os.environ["WORLD_SIZE"])
found = {name: tensor.clone() for name, tensor in of.tensors()}
if of.rank == 0:
    from safetensors.torch import save_file

    save_file(found, f"{out}/tensors.safetensors")
else:
    assert not found
