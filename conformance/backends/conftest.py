"""The backends under test, for every test that asks for one."""

import pytest
import trainer_backends
from trainer_backends import Backend


@pytest.fixture(scope="module", params=trainer_backends.present(), ids=lambda backend: backend.name)
def backend(request) -> Backend:
    """Each backend of a language model that GVPO_SUBJECTS asks for."""
    return request.param
