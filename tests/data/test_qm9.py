"""QM9: packing, units, splits; made-up files in the layout of the real ones."""

import hashlib

import numpy as np
import pytest

from mtljax.data import DataError, MissingDataError, catalogue, load
from mtljax.data._qm9 import _SUBSET_KEYS, TARGETS

COUNT = 40
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(COUNT, 19)) * 10.0 ** np.arange(19)[None] / 1e9
ORDER = (
    "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298",
    "cv", "u0_atom", "u298_atom", "h298_atom", "g298_atom", "A", "B", "C",
)  # fmt: skip
NAMES = np.array(ORDER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("qm9")
    atoms = RNG.integers(3, 10, COUNT)
    real = np.arange(9) < atoms[:, None]
    draw = lambda high: np.where(real, RNG.integers(0, high, (COUNT, 9)), 0)
    z = np.where(real, RNG.integers(6, 10, (COUNT, 9)), 0)
    adj = RNG.integers(0, 5, (COUNT, 9, 9)) * (real[:, :, None] & real[:, None])
    (root / "qm9_subset").mkdir()
    np.savez(
        root / "qm9_subset" / "qm9_graphs.npz",
        z=z.astype(np.uint8),
        num_h=draw(4).astype(np.uint8),
        charge=(draw(3) - real).astype(np.int8),
        hyb=np.where(real, draw(4), 255).astype(np.uint8),
        in_ring=draw(2).astype(np.uint8),
        adj=adj.astype(np.uint8),
        y=Y,
        y_names=NAMES,
    )
    (root / "qm9").mkdir()
    np.savez(
        root / "qm9" / "qm9.npz",
        z=np.pad(z, ((0, 0), (0, 20))).astype(np.uint8),
        positions=RNG.normal(size=(COUNT, 29, 3)).astype(np.float32),
        y=Y,
        y_names=NAMES,
    )
    return root


def read(folder, name, **options):
    sizes = {"val_size": 6, "test_size": 8} | options
    return load(name, data_dir=folder, **sizes)


@pytest.mark.parametrize(
    ("name", "shape"), [("qm9_subset", (9, 14, 1)), ("qm9", (29, 4, 1))]
)
def test_splits_and_targets(folder, name, shape):
    found = read(folder, name)
    assert [task.name for task in found.tasks] == list(TARGETS)
    assert found.input_shape == shape
    for part, size in (("train", 26), ("val", 6), ("test", 8)):
        assert getattr(found, part)["image"].shape == (size, *shape)
    # In the targets' units every molecule occurs once.
    energy = 27.211386245988
    factor = {"homo": energy, "lumo": energy, "zpve": energy}
    factor |= dict.fromkeys(("u0", "u", "h", "g"), 0.0433641153087705)
    statistics = found.origin["targets"]
    for i, task in enumerate(TARGETS):
        key = _SUBSET_KEYS[task][0]
        wanted = Y[:, NAMES.tolist().index(key)] * factor.get(task, 1.0)
        parts = [getattr(found, part)[task] for part in ("train", "val", "test")]
        values = np.concatenate(parts) * statistics["std"][i] + statistics["mean"][i]
        np.testing.assert_allclose(np.sort(values), np.sort(wanted), rtol=1e-4,
                                   atol=1e-5 * wanted.std())  # fmt: skip
        np.testing.assert_allclose(parts[0].mean(), 0, atol=1e-6)
        np.testing.assert_allclose(parts[0].std(), 1, rtol=1e-5)


def test_a_molecule_is_its_atoms_and_bonds(folder):
    found = read(folder, "qm9_subset")
    with np.load(folder / "qm9_subset" / "qm9_graphs.npz") as file:
        z, adj, charge, hyb = (file[key] for key in ("z", "adj", "charge", "hyb"))
    order = np.concatenate([getattr(found, p)["image"] for p in ("test", "val")])
    rows = {hashlib.sha256(i.tobytes()).digest() for i in order}
    assert len(rows) == 14
    for image in order[..., 0]:
        (at,) = [
            i for i in range(COUNT)
            if (z[i] == image[:, 0]).all() and (adj[i] == image[:, 5:]).all()
        ]  # fmt: skip
        real = z[at] > 0
        np.testing.assert_array_equal(image[real, 2], charge[at][real] + 1)
        np.testing.assert_array_equal(image[real, 3], hyb[at][real])
        assert (image[~real] == 0).all()


def test_the_seed_decides_and_a_smaller_set_is_a_prefix(folder):
    one, small = read(folder, "qm9"), read(folder, "qm9", train_size=5)
    other = read(folder, "qm9", seed=1)
    np.testing.assert_array_equal(small.train["image"], one.train["image"][:5])
    np.testing.assert_array_equal(small.test["image"], one.test["image"])
    assert (other.test["image"] != one.test["image"]).any()


def test_the_catalogue(monkeypatch, folder):
    """The rows of ``qm9/original``: energies of atomisation in Hartree."""
    with np.load(folder / "qm9" / "qm9.npz") as file:
        arrays = dict(file)
    column = {name: arrays["y"][:, i] for i, name in enumerate(NAMES.tolist())}
    hartree = 27.211386245988 / 0.0433641153087705  # kcal/mol

    class Rows:
        def __len__(self):
            return COUNT

        def __getitems__(self, indices):
            names = ["U0", "U", "H", "G"]
            old = ["u0_atom", "u298_atom", "h298_atom", "g298_atom"]
            return [
                {"charges": arrays["z"][i].astype(np.int64)}
                | {"positions": arrays["positions"][i], "Cv": column["cv"][i]}
                | {k: v[i] for k, v in column.items()}
                | {f"{n}_atomization": column[o][i] / hartree
                   for n, o in zip(names, old, strict=True)}
                for i in indices
            ]  # fmt: skip

    asked = []
    monkeypatch.setattr(
        catalogue, "tfds_source", lambda *a, **k: (asked.append((a, k)), Rows())[1]
    )
    found = read(folder, "qm9", source="tfds")
    same = read(folder, "qm9")
    assert asked[0][0] == ("qm9/original", "train")
    for part in ("train", "val", "test"):
        for key, array in getattr(same, part).items():
            np.testing.assert_allclose(getattr(found, part)[key], array, atol=2e-5)


@pytest.mark.usefixtures("as_users")
def test_errors(folder, tmp_path):
    with pytest.raises(MissingDataError, match=r"qm9_graphs\.npz"):
        load("qm9_subset", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"has 40 examples.*ask for more"):
        read(folder, "qm9", val_size=39)
    with pytest.raises(DataError, match="train_size must be >= 0, not -1"):
        read(folder, "qm9", train_size=-1)
    with pytest.raises(DataError, match="seed must be >= 0, not -1"):
        read(folder, "qm9_subset", seed=-1)
    with pytest.raises(DataError, match="source must be 'files' or 'tfds'"):
        load("qm9", source="web")
    with pytest.raises(DataError, match="works with source='tfds' only"):
        load("qm9", download=True)
    (tmp_path / "qm9").mkdir()
    np.savez(tmp_path / "qm9" / "qm9.npz", z=np.zeros((3, 29)))
    with pytest.raises(DataError, match=r"holds \['z'\]; it lacks \['positions'"):
        load("qm9", data_dir=tmp_path)
    (tmp_path / "qm9" / "qm9.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="not a readable"):
        load("qm9", data_dir=tmp_path)


@pytest.mark.data
def test_real_molecules(real_data_dir):
    found = load("qm9_subset", data_dir=real_data_dir)
    assert len(found.train["image"]) == 11712
    statistics = dict(zip(TARGETS, found.origin["targets"]["mean"], strict=True))
    # Means over all of QM9, in the literature: 2.67 D, 75.2 a0³, -6.54 eV, -76 eV.
    np.testing.assert_allclose(statistics["mu"], 2.69, atol=0.05)
    np.testing.assert_allclose(statistics["alpha"], 75.2, atol=0.3)
    np.testing.assert_allclose(statistics["homo"], -6.53, atol=0.03)
    np.testing.assert_allclose(statistics["u0"], -76.0, atol=0.5)
    bonds = found.train["image"][..., 5:, 0]
    np.testing.assert_array_equal(bonds, bonds.transpose(0, 2, 1))
