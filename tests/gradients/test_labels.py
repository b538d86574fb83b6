"""Labels of shared and own parameters: what is accepted, what is said when not."""

import jax
import jax.numpy as jnp
import optax
import pytest
from gradients.problem import LABELS, batch, params, task_losses

import mtljax

PARAMS = params()
FULL = {
    "trunk": {"kernel": "shared", "bias": "shared"},
    "heads": [{"kernel": "own"}] * 3,
}


@pytest.mark.parametrize(
    "own",
    [
        "heads",
        "heads/",
        "heads/*",
        "*/?/kernel",
        ["heads/0", "heads/1/kernel", "heads/2"],
    ],
)
def test_label_params_by_prefix_and_glob(own):
    assert mtljax.label_params(PARAMS, own=own) == FULL


def test_a_prefix_is_whole_path_components():
    tree = {"head": 1.0, "header": 2.0}
    assert mtljax.label_params(tree, own="head") == {"head": "own", "header": "shared"}


def test_label_params_errors():
    with pytest.raises(ValueError, match=r"own='tail' matches no parameter.*heads/0"):
        mtljax.label_params(PARAMS, own=["heads", "tail"])
    with pytest.raises(ValueError, match="matches every parameter; nothing is shared"):
        mtljax.label_params(PARAMS, own=["heads", "trunk"])


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("own", "labels='own' is a string"),
        ({"trunk": "shared"}, "has the paths trunk, and the parameters have heads/0"),
        ({"trunk": "shared", "heads": "private"}, "'heads/0/kernel'.*'private'"),
        ({"trunk": "own", "heads": "own"}, "mark no parameter as 'shared'"),
        ({"trunk": "shared", "heads": "shared"}, "as 'own'.*Leave labels out"),
        (lambda path: None, "'heads/0/kernel' is labelled None"),
    ],
)
def test_labels_that_make_no_sense(labels, message):
    function = mtljax.value_and_task_grads(task_losses, labels=labels)
    with pytest.raises(ValueError, match=message):
        function(PARAMS, batch())


def test_shared_params_hides_the_heads():
    shared = mtljax.shared_params(PARAMS, LABELS)
    assert shared["heads"] == [{"kernel": optax.MaskedNode()}] * 3
    assert jax.tree.leaves(shared) == jax.tree.leaves(shared["trunk"])
    assert shared["trunk"]["kernel"] is PARAMS["trunk"]["kernel"]


def test_check_labels_finds_a_trunk_labelled_own():
    mtljax.check_labels(task_losses, LABELS, PARAMS, batch())

    def wrong(path):
        return "own" if path == "trunk/bias" else "shared"

    with pytest.raises(
        ValueError, match=r"'trunk/bias' is labelled 'own'.*\[0, 1, 2\]"
    ):
        mtljax.check_labels(task_losses, wrong, PARAMS, batch())


def test_check_labels_names_the_tasks_that_share_a_head():
    def crossed(p, batch):
        losses = task_losses(p, batch)
        return losses.at[2].add(jnp.sum(p["heads"][0]["kernel"] ** 2))

    with pytest.raises(ValueError, match=r"'heads/0/kernel'.*tasks \[0, 2\]"):
        mtljax.check_labels(crossed, LABELS, PARAMS, batch())
