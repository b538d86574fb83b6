"""Trunk and heads behind init/apply: what every model promises."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import models

HEADS = {"a": 3, "b": 2}
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
OPTIONS = {
    "mlp": {"hidden": (6, 5)},
    "lenet": {"channels": (2, 3), "kernels": (3, 2), "features": 5},
    "resnet18": {"width": 2, "blocks": (1,), "features": 3, "stem": "cifar"},
}
every_model = pytest.mark.parametrize("name", OPTIONS)


class Made(NamedTuple):
    """One model with its two functions compiled once for the whole file."""

    init: Callable
    apply: Callable
    variables: models.Variables


@functools.cache
def make(name, tasks=("a", "b"), **options):
    heads = {task: HEADS[task] for task in tasks}
    model = models.build(name, heads, **OPTIONS[name], **options)
    init = jax.jit(model.init)
    apply = jax.jit(model.apply, static_argnames=("train", "update_stats"))
    return Made(init, apply, init(KEY, IMAGES))


def norm(tree):
    return sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))


@every_model
def test_structure_and_shapes(name):
    _, apply, variables = make(name)
    assert set(variables.params) == {"trunk", "heads"}
    assert set(variables.params["heads"]) == set(HEADS)
    assert type(variables.params) is dict
    outputs, stats = apply(variables, IMAGES, train=False)
    shapes = {task: out.shape for task, out in outputs.items()}
    assert shapes == {"a": (4, 3), "b": (4, 2)}
    assert stats == {} or name == "resnet18"


@every_model
def test_same_key_same_start(name):
    init, _, variables = make(name)
    chex.assert_trees_all_equal(variables, init(KEY, IMAGES))
    other = init(jax.random.key(1), IMAGES)
    for layer, first in variables.params["heads"].items():
        assert (first["kernel"] != other.params["heads"][layer]["kernel"]).all()


def test_single_task_starts_as_multi_task():
    _, _, both = make("mlp")
    _, _, one = make("mlp", tasks=("b",))
    chex.assert_trees_all_equal(one.params["trunk"], both.params["trunk"])
    chex.assert_trees_all_equal(one.params["heads"]["b"], both.params["heads"]["b"])


@every_model
def test_a_task_s_loss_reaches_the_trunk_and_its_own_head_only(name):
    _, apply, variables = make(name)

    def loss(params, task):
        outputs, _ = apply((params, variables.batch_stats), IMAGES, train=True)
        return jnp.square(outputs[task] - 1).sum()

    grads = jax.jit(jax.grad(loss), static_argnums=1)(variables.params, "a")
    assert norm(grads["heads"]["b"]) == 0
    for leaf in (grads["heads"]["a"], grads["trunk"]):
        assert np.isfinite(norm(leaf))
        assert norm(leaf) > 0


@every_model
def test_no_retrace(name):
    _, apply, variables = make(name)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(variables, x, key):
        outputs, stats = apply(variables, x, train=True, key=key)
        return outputs, models.Variables(variables.params, stats)

    for seed in range(3):
        _, new = step(variables, IMAGES + seed, jax.random.key(seed))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
        variables = new


def test_init_maps_over_seeds():
    init, apply, one = make("mlp")
    keys = jnp.stack([KEY, jax.random.key(1)])
    both = jax.jit(jax.vmap(init, (0, None)))(keys, IMAGES)
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], both)
    chex.assert_trees_all_close(first, one, rtol=1e-6)
    run = lambda v: apply(v, IMAGES, train=False)[0]
    assert jax.eval_shape(jax.vmap(run), both)["a"].shape == (2, 4, 3)


@every_model
def test_bfloat16_computes_near_float32(name):
    _, apply, variables = make(name)
    half = models.build(name, HEADS, **OPTIONS[name], dtype=jnp.bfloat16)
    half_variables = jax.eval_shape(half.init, KEY, IMAGES)
    chex.assert_trees_all_equal_dtypes(half_variables, variables)
    run = jax.jit(lambda v: half.apply(v, IMAGES, train=False)[0])
    for line in str(jax.make_jaxpr(run)(variables)).splitlines():
        if " = dot_general[" in line or " = conv_general_dilated[" in line:
            assert ":bf16[" in line
    outputs = run(variables)
    expected, _ = apply(variables, IMAGES, train=False)
    chex.assert_trees_all_equal_dtypes(outputs, expected)
    for task, out in outputs.items():
        np.testing.assert_allclose(out, expected[task], atol=0.05)
        assert (np.asarray(out) != np.asarray(expected[task])).any()


def test_three_modes_of_batch_normalisation():
    _, apply, variables = make("resnet18")
    params, stats = variables
    moved_out, moved = apply(variables, IMAGES, train=True)
    still_out, still = apply((params, stats), IMAGES, train=True, update_stats=False)
    eval_out, unchanged = apply(variables, IMAGES, train=False)

    chex.assert_trees_all_close(moved_out, still_out, rtol=1e-6)
    chex.assert_trees_all_equal(still, stats)
    chex.assert_trees_all_equal(unchanged, stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, stats)
    assert not jnp.allclose(eval_out["a"], moved_out["a"])

    # The stem's running average, by numpy: 36 zero-padded patches, then 0.1 of the way.
    kernel = np.asarray(params["trunk"]["stem_conv"]["kernel"], np.float64)
    padded = np.pad(IMAGES.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    maps = np.concatenate(patches, -1).reshape(-1, 9) @ kernel.reshape(9, 2)
    got = moved["stem_norm"]
    np.testing.assert_allclose(got["mean"], 0.1 * maps.mean(0), rtol=1e-4)
    np.testing.assert_allclose(got["var"], 0.9 + 0.1 * maps.var(0, ddof=1), rtol=1e-4)


def test_hessian_vector_product_of_a_resnet_with_max_pool():
    model = models.build(
        "resnet18", {"a": 1}, width=1, blocks=(1,), features=None, stem="imagenet"
    )
    params, stats = jax.jit(model.init)(KEY, IMAGES)
    loss = lambda p: model.apply((p, stats), IMAGES, train=True)[0]["a"].mean() ** 2
    hvp = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (p,))[1])(params)
    assert np.isfinite(norm(hvp))


def test_uint8_images():
    _, apply, variables = make("mlp")
    outputs, _ = apply(variables, np.ones((4, 8, 8, 1), np.uint8), train=False)
    assert outputs["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("vgg", HEADS), "choose one of mlp, lenet, resnet18"),
        (
            lambda: models.build("mlp", HEADS, stem="cifar"),
            "Unknown option 'stem' of model 'mlp'; choose from hidden, activation",
        ),
        (lambda: models.build("mlp", {}), "at least one head"),
        (lambda: models.build("mlp", {"a": 0}), "Head 'a' needs at least one output"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
