import jax
import jaxtyping
import pytest
from registry import CLASSICS

import mtljax

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def as_users():
    """Signatures are checked in tests only; this shows the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LATE = {f"test_{name}" for name in set(mtljax.METHODS) - CLASSICS}
LATE |= {"test_wrappers", "test_implicit", "test_cone", "test_conditional"}


def pytest_collection_modifyitems(items):
    """What costs minutes of compilation runs in deep; see tests/registry.py."""
    for item in items:
        if item.path.stem in LATE:
            item.add_marker(pytest.mark.deep)
