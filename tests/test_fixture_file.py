"""Fixtures' files: what was recorded comes back, in the same bytes each time, and small."""

import numpy as np

from fixture_file import save_npz


def test_what_is_saved_comes_back(tmp_path):
    noise = np.random.default_rng(0)
    frames = np.zeros((20, 64, 64, 3), np.uint8)
    frames[:, 20:40, 20:40] = noise.integers(0, 255, (20, 20, 20, 3))
    arrays = {"frames": frames, "states/first": noise.normal(size=(5, 2)), "names": ["a", "bc"]}
    for name in ("one", "two"):
        save_npz(tmp_path / f"{name}.npz", arrays)
    with np.load(tmp_path / "one.npz", allow_pickle=False) as found:
        assert found.files == list(arrays)
        for name, values in arrays.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == np.asarray(values).dtype
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    np.savez_compressed(tmp_path / "deflated.npz", frames=frames)
    save_npz(tmp_path / "frames.npz", {"frames": frames})
    size = (tmp_path / "frames.npz").stat().st_size
    assert size < (tmp_path / "deflated.npz").stat().st_size
