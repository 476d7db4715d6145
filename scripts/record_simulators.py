"""Record what the public PushT and PointMaze do, as fixtures for the tests.

    python -m venv simulators
    simulators/bin/pip install torch numpy einops matplotlib gym==0.26.2 shapely scikit-image \
        opencv-python-headless pygame pymunk==6.8.1 mujoco
    simulators/bin/python scripts/record_simulators.py --dino-wm PATH --out tests/fixtures

PATH is a checkout of github.com/gaoyuezhou/dino_wm; its commit and the versions of the engines are
in `tests/fixtures/manifest_simulators.json`. Run once. These libraries are the public code's own,
which this package does without, except for the two engines; therefore a script of its own.

Nothing of the public code is rewritten: every recorded output comes out of PushTWrapper and
PointMazeWrapper. What is replaced while they are imported:

* the package `env`: its `__init__` registers simulators that need FleX. `utils`: one function.
* for PointMaze `gym`, `d4rl` and `mujoco_py`, which needs MuJoCo 2.1's archive: `MujocoEnv` below
  is gym's class on MuJoCo's own package, with the calls of mujoco_py that the public code makes.
  The model is the XML that the public code writes, without the attribute coordinate="local" that
  MuJoCo dropped because nothing else is left. `render` puts the free camera where mujoco_py puts
  it (at the median of the geoms, as far away as the model's extent) and returns the picture
  bottom row first, as mujoco_py reads it. It needs a GL library (`MUJOCO_GL=osmesa` or `egl`).

What is fed to them is in `reference_pusht.py` and `reference_point_maze.py`.
"""

import argparse
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pymunk

import reference_point_maze as point_maze
import reference_pusht as pusht
from fixture_file import save_npz

ROOT = Path(__file__).parents[1]


def import_public_code(dino_wm: Path) -> types.SimpleNamespace:
    """The two wrappers, imported with the replacements that the module's docstring lists."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(dino_wm))
    _package("env", dino_wm / "env")
    _module("utils", aggregate_dct=_stacked)
    wrapper = importlib.import_module("env.pusht.pusht_wrapper").PushTWrapper
    mujoco_env = _module("gym.envs.mujoco.mujoco_env", MujocoEnv=MujocoEnv)
    _module("gym.envs.mujoco", mujoco_env=mujoco_env)
    offline_env = _module("d4rl.offline_env", OfflineEnv=type("OfflineEnv", (Nothing,), {}))
    _module("d4rl", offline_env=offline_env)
    _package("env.pointmaze", dino_wm / "env/pointmaze")
    maze = importlib.import_module("env.pointmaze.point_maze_wrapper").PointMazeWrapper
    return types.SimpleNamespace(PushTWrapper=wrapper, PointMazeWrapper=maze)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def _package(name: str, folder: Path) -> None:
    _module(name).__path__ = [str(folder)]


def _stacked(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


class Nothing:
    """A base class that takes any argument."""

    def __init__(self, **ignored: Any) -> None:
        del ignored


class MujocoEnv:
    """gym's MujocoEnv on MuJoCo's own package."""

    def __init__(self, model_path: str, frame_skip: int) -> None:
        text = Path(model_path).read_text().replace('coordinate="local"', "")
        self.frame_skip = frame_skip
        self.sim = Simulation(mujoco.MjModel.from_xml_string(text))
        self.model, self.data = self.sim.model, self.sim.data
        self.init_qvel = self.data.qvel.copy()
        self.action_space = types.SimpleNamespace(shape=(2,))
        self.observation_space = types.SimpleNamespace(dtype=np.float32)

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.data.qpos[:], self.data.qvel[:] = qpos.copy(), qvel.copy()
        self.sim.forward()

    def do_simulation(self, control: np.ndarray, frames: int) -> None:
        self.data.ctrl[:] = control
        for _ in range(frames):
            self.sim.step()


class Simulation:
    """The calls of mujoco_py's MjSim that the public code makes."""

    def __init__(self, model: Any) -> None:
        self._model, self.data = model, mujoco.MjData(model)
        self.model = Model(model)
        self.render_contexts: list[Any] = []
        self._renderer: Any = None

    def forward(self) -> None:
        mujoco.mj_forward(self._model, self.data)

    def step(self) -> None:
        mujoco.mj_step(self._model, self.data)

    def reset(self) -> None:
        mujoco.mj_resetData(self._model, self.data)

    def render(self, width: int, height: int) -> np.ndarray:
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._model, height, width)
            camera = mujoco.MjvCamera()
            camera.lookat[:] = np.median(self.data.geom_xpos, axis=0)
            camera.distance = self._model.stat.extent
            self.render_contexts.append(types.SimpleNamespace(cam=camera))
        self._renderer.update_scene(self.data, self.render_contexts[0].cam)
        return self._renderer.render()[::-1].copy()


class Model:
    """The members of mujoco_py's model that the public code reads."""

    def __init__(self, model: Any) -> None:
        self._model, self.nq, self.nv = model, model.nq, model.nv

    def site_name2id(self, name: str) -> int:
        return mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_SITE, name)


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dino-wm", type=Path, required=True, help="checkout of dino_wm")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    public = import_public_code(arguments.dino_wm.resolve())
    files = {
        "pusht": pusht.record(public.PushTWrapper, arguments.seed),
        "point_maze": point_maze.record(public.PointMazeWrapper, arguments.seed),
    }
    for name, arrays in files.items():
        path = arguments.out / f"{name}.npz"
        save_npz(path, arrays)
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KiB")
    manifest = {
        "seed": arguments.seed,
        "commits": {"gaoyuezhou/dino_wm": commit_of(arguments.dino_wm)},
        "versions": {
            "pymunk": pymunk.version,
            "mujoco": mujoco.__version__,
            "numpy": np.__version__,
        },
    }
    path = arguments.out / "manifest_simulators.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
