"""Models with T linear heads in JAX and in PyTorch, with the same weights.

NumPy creates the parameters in JAX's layout (``[in, out]``, ``[h, w, in, out]``) under
PyTorch's names. ``to_torch`` converts them to PyTorch's layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, Any]
CLASSES = 10


class Problem(NamedTuple):
    """A model, its weights and one batch."""

    model: str
    tasks: int
    size: str
    params: Any  # {"trunk": {name: array}, "heads": [{"weight", "bias"}, ...]}
    x: np.ndarray
    y: np.ndarray  # [T, n]: numbers, or classes
    trunk: Callable[[Weights, Any], Any]  # the trunk in JAX
    module: Callable[[], Any]  # the trunk in PyTorch

    def task_losses(self, params: Any, batch: Any) -> jax.Array:
        """Returns one loss per task, ``[T]``."""
        return self.head_losses(params, self.encode(params, batch), batch)

    def encode(self, params: Any, batch: Any) -> jax.Array:
        """Computes the features ``[n, width]`` that all heads read."""
        return self.trunk(params["trunk"], batch[0])

    def head_losses(self, params: Any, features: jax.Array, batch: Any) -> jax.Array:
        """Computes the losses ``[T]`` of given features."""
        outs = [features @ head["weight"] + head["bias"] for head in params["heads"]]
        pairs = zip(outs, batch[1], strict=True)
        return jnp.stack([_loss(out, target) for out, target in pairs])


def _loss(out: jax.Array, y: jax.Array) -> jax.Array:
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.mean((out[:, 0] - y) ** 2)
    return -jnp.mean(jax.nn.log_softmax(out)[jnp.arange(len(y)), y])


def torch_losses(trunk: Any, heads: Any, x: Any, y: Any) -> tuple[Any, list[Any]]:
    """Computes features and a list of losses in PyTorch."""
    from torch.nn import functional

    h = trunk(x)
    losses = []
    for head, target in zip(heads, y, strict=True):
        out = head(h)
        if target.is_floating_point():
            losses.append(((out[:, 0] - target) ** 2).mean())
        else:
            losses.append(functional.cross_entropy(out, target))
    return h, losses


def to_torch(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts weights to PyTorch's layout: outputs first, channels before pixels."""
    value = np.asarray(value)
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(value.T if value.ndim == 2 else value).reshape(shape)


def _weights(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> Weights:
    made: Weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            scale = np.sqrt(2 / np.prod(shape[:-1]))
            made[name] = (rng.normal(size=shape) * scale).astype(np.float32)
        else:
            fill = np.zeros if name.endswith("bias") else np.ones
            made[name] = fill(shape, np.float32)
    return made


def _problem(model, tasks, size, x, *, shapes, trunk, module, width) -> Problem:
    regression = model == "mlp"
    rng = np.random.default_rng(0)
    outputs = 1 if regression else CLASSES
    head = {"weight": (width, outputs), "bias": (outputs,)}
    params = {
        "trunk": _weights(rng, shapes),
        "heads": [_weights(rng, head) for _ in range(tasks)],
    }
    if regression:
        y = rng.normal(size=(tasks, len(x))).astype(np.float32)
    else:
        y = rng.integers(0, CLASSES, (tasks, len(x)))
    return Problem(model, tasks, size, params, x, y, trunk, module)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def mlp(tasks: int, examples: int = 128, width: int = 512) -> Problem:
    """256-w-w-w with biases and ReLU, and one number per head."""
    sizes = [256, width, width, width]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        shapes[f"{2 * i}.weight"] = (sizes[i], sizes[i + 1])
        shapes[f"{2 * i}.bias"] = (sizes[i + 1],)

    def trunk(p, x):
        for i in (0, 2, 4):
            x = jax.nn.relu(x @ p[f"{i}.weight"] + p[f"{i}.bias"])
        return x

    def module():
        from torch import nn

        layers = []
        for i in range(3):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        return nn.Sequential(*layers)

    x = _normal(examples, 256)
    size = f"width {width}, N={examples}"
    sides = {"shapes": shapes, "trunk": trunk, "module": module}
    return _problem("mlp", tasks, size, x, width=width, **sides)


def _conv(x: Any, w: Any, stride: int = 1, padding: int = 0) -> Any:
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def lenet(tasks: int, examples: int = 128) -> Problem:
    """The two convolutions of the usual Multi-MNIST trunk, on 36x36 images."""
    shapes: dict[str, tuple[int, ...]] = {
        "0.weight": (9, 9, 1, 10),
        "0.bias": (10,),
        "3.weight": (5, 5, 10, 20),
        "3.bias": (20,),
        "7.weight": (5, 5, 20, 50),
        "7.bias": (50,),
    }

    def pool(h):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, window, "VALID")

    def trunk(p, x):
        for i in (0, 3):
            x = jax.nn.relu(pool(_conv(x, p[f"{i}.weight"]) + p[f"{i}.bias"]))
        dense = p["7.weight"].reshape(-1, 50)
        return jax.nn.relu(x.reshape(len(x), -1) @ dense + p["7.bias"])

    def module():
        from torch import nn

        return nn.Sequential(
            nn.Conv2d(1, 10, 9),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(500, 50),
            nn.ReLU(),
        )

    x = _normal(examples, 36, 36, 1)
    size = f"36x36, N={examples}"
    sides = {"shapes": shapes, "trunk": trunk, "module": module}
    return _problem("lenet", tasks, size, x, width=50, **sides)


def transformer(
    tasks: int, sequences: int = 32, length: int = 64, layers: int = 2, width: int = 256
) -> Problem:
    """Pre-norm layers with eight attention heads, and the mean over tokens."""
    d, attention_heads, tokens = width, 8, length
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        shapes |= {f"{i}.{name}.weight": (d, d) for name in "qkvo"}
        for name in ("norm1", "norm2"):
            shapes |= {f"{i}.{name}.weight": (d,), f"{i}.{name}.bias": (d,)}
        shapes |= {f"{i}.up.weight": (d, 4 * d), f"{i}.up.bias": (4 * d,)}
        shapes |= {f"{i}.down.weight": (4 * d, d), f"{i}.down.bias": (d,)}

    def trunk(p, x):
        n, length, _ = x.shape

        def norm(x, name):
            x = x - x.mean(-1, keepdims=True)
            x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
            return x * p[f"{name}.weight"] + p[f"{name}.bias"]

        for i in range(layers):
            h = norm(x, f"{i}.norm1")
            q, k, v = (
                (h @ p[f"{i}.{name}.weight"]).reshape(n, length, attention_heads, -1)
                for name in "qkv"
            )
            scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(d / attention_heads)
            mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
            x = x + mixed.reshape(x.shape) @ p[f"{i}.o.weight"]
            h = norm(x, f"{i}.norm2") @ p[f"{i}.up.weight"] + p[f"{i}.up.bias"]
            x = x + jax.nn.gelu(h) @ p[f"{i}.down.weight"] + p[f"{i}.down.bias"]
        return x.mean(1)

    def module():
        from torch import nn
        from torch.nn import functional

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                for name in "qkvo":
                    self.add_module(name, nn.Linear(d, d, bias=False))
                self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
                self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

            def forward(self, x):
                n, length, _ = x.shape
                h = self.norm1(x)
                q, k, v = (
                    f(h).reshape(n, length, attention_heads, -1).transpose(1, 2)
                    for f in (self.q, self.k, self.v)
                )
                # PyTorch's fused attention has no batching rule for vmap.
                scores = q @ k.transpose(2, 3) / np.sqrt(d / attention_heads)
                mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
                x = x + self.o(mixed)
                h = functional.gelu(self.up(self.norm2(x)), approximate="tanh")
                return x + self.down(h)

        class Mean(nn.Module):
            def forward(self, x):
                return x.mean(1)

        return nn.Sequential(*(Layer() for _ in range(layers)), Mean())

    x = _normal(sequences, tokens, d)
    size = f"{sequences}x{tokens} tokens"
    if (layers, width) != (2, 256):
        size = f"{layers} layers of {width}, {size}"
    sides = {"shapes": shapes, "trunk": trunk, "module": module}
    return _problem("transformer", tasks, size, x, width=d, **sides)


_STAGES = ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2))


def resnet18(tasks: int, examples: int = 8, channels: int = 64) -> Problem:
    """ResNet-18 with a 3x3 stem for 32x32 images and statistics of the batch."""
    shapes: dict[str, tuple[int, ...]] = {"0.weight": (3, 3, 3, channels)}
    shapes |= {"1.weight": (channels,), "1.bias": (channels,)}
    blocks = []
    for inner, outer, stride in _STAGES:
        a, b = channels * inner, channels * outer
        blocks += [(a, b, stride), (b, b, 1)]
    for i, (a, b, stride) in enumerate(blocks, 3):
        shapes |= {f"{i}.conv1.weight": (3, 3, a, b), f"{i}.conv2.weight": (3, 3, b, b)}
        norms = ["norm1", "norm2"]
        if stride > 1:
            shapes[f"{i}.skip.weight"] = (1, 1, a, b)
            norms.append("norm3")
        for name in norms:
            shapes |= {f"{i}.{name}.weight": (b,), f"{i}.{name}.bias": (b,)}

    def trunk(p, x):
        def norm(h, name):
            mean = h.mean((0, 1, 2))
            scale = jax.lax.rsqrt(h.var((0, 1, 2)) + 1e-5)
            return (h - mean) * scale * p[f"{name}.weight"] + p[f"{name}.bias"]

        h = jax.nn.relu(norm(_conv(x, p["0.weight"], 1, 1), "1"))
        for i, (_, _, stride) in enumerate(blocks, 3):
            z = norm(_conv(h, p[f"{i}.conv1.weight"], stride, 1), f"{i}.norm1")
            z = _conv(jax.nn.relu(z), p[f"{i}.conv2.weight"], 1, 1)
            skip = h
            if stride > 1:
                skip = norm(_conv(h, p[f"{i}.skip.weight"], stride), f"{i}.norm3")
            h = jax.nn.relu(norm(z, f"{i}.norm2") + skip)
        return h.mean((1, 2))

    def module():
        from torch import nn
        from torch.nn import functional

        def norm(width):
            return nn.BatchNorm2d(width, track_running_stats=False)

        class Block(nn.Module):
            def __init__(self, a, b, stride):
                super().__init__()
                self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
                self.norm1, self.norm2 = norm(b), norm(b)
                self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
                self.skip = self.norm3 = None
                if stride > 1:
                    self.skip = nn.Conv2d(a, b, 1, stride, bias=False)
                    self.norm3 = norm(b)

            def forward(self, x):
                z = functional.relu(self.norm1(self.conv1(x)))
                z = self.norm2(self.conv2(z))
                skip = x
                if self.skip is not None and self.norm3 is not None:
                    skip = self.norm3(self.skip(x))
                return functional.relu(z + skip)

        class Mean(nn.Module):
            def forward(self, x):
                return x.mean((2, 3))

        stem = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), norm(channels), nn.ReLU()]
        return nn.Sequential(*stem, *(Block(*block) for block in blocks), Mean())

    x = _normal(examples, 32, 32, 3)
    size = f"32x32, N={examples}"
    if channels != 64:
        size = f"{channels} channels, {size}"
    sides = {"shapes": shapes, "trunk": trunk, "module": module}
    return _problem("resnet18", tasks, size, x, width=8 * channels, **sides)


MODELS: dict[str, Callable[..., Problem]] = {
    "mlp": mlp,
    "lenet": lenet,
    "transformer": transformer,
    "resnet18": resnet18,
}
