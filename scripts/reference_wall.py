"""What the public Wall environment does."""

import dataclasses
import types
from typing import Any

import numpy as np
import torch

Arrays = dict[str, Any]
LAYOUTS = ((32, 30), (32, 10), (32, 54), (20, 30), (44, 16), (25, 47))
"""Wall x and door y; the first is DINO-WM's own, the others span the ranges it allows."""


def make_wall(public: types.SimpleNamespace, wall_x: int, door_y: int) -> Any:
    """The public environment, built with this layout (its defaults are one shared object)."""
    config = dataclasses.replace(
        public.wall.DEFAULT_CFG, fix_wall_location=wall_x, fix_door_location=door_y
    )
    return public.wall.WallEnvWrapper(wall_config=config)


def draw_transitions(
    rng: np.random.Generator, wall_x: int, door_y: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Positions and actions by group, aimed at the places where the collision rules differ."""
    faces, edges = np.array([wall_x - 3.0, wall_x + 3.0]), np.array([door_y - 4.0, door_y + 4.0])
    borders = np.array([4.0, 60.0])

    def normal(count: int, std: float) -> np.ndarray:
        return rng.normal(0, std, (count, 2))

    def uniform(count: int, *ranges: tuple[float, float]) -> np.ndarray:
        return np.stack([rng.uniform(low, high, count) for low, high in ranges], axis=1)

    room = (4.3, 59.7)
    at_face = uniform(220, (0, 1), room)
    at_face[:, 0] = np.where(
        rng.random(220) < 0.5, faces[0] - 3 * at_face[:, 0], faces[1] + 3 * at_face[:, 0]
    )
    opening = uniform(180, (faces[0], faces[1]), (edges[0], edges[1]))
    corner = np.stack([rng.choice(faces, 110), rng.choice(edges, 110)], 1) + normal(110, 1.5)
    border = uniform(160, room, room)
    border[:80, 0] = np.abs(rng.choice(borders, 80) - rng.uniform(0, 1.5, 80))
    border[60:, 1] = rng.choice(borders, 100) + rng.uniform(-1.5, 1.5, 100)
    solid = uniform(25, (faces[0], faces[1]), room)
    mixed = np.concatenate([at_face[-60:], opening[-40:], border[-40:]])
    single = normal(len(mixed), 1.5)
    single[np.arange(len(mixed)), rng.integers(0, 2, len(mixed))] = 0
    special_x = np.concatenate(
        [faces, borders, [wall_x, faces[0] - 0.3, faces[1] + 0.3, 4.3, 59.7]]
    )
    special_y = np.concatenate([edges, borders, [door_y, edges[0] + 0.5, edges[1] - 0.5, 4.3]])
    exact = np.stack([rng.choice(special_x, 150), rng.choice(special_y, 150)], axis=1)
    lattice = rng.integers(-8, 9, (150, 2)) * 0.25
    lattice[rng.random(150) < 0.1] = 0
    # Diagonal moves that meet two surfaces at the same point: which one counts is a tie.
    corners = [(4, 4), (4, 60), (60, 4), (60, 60)]
    corners += [(x, y) for x in faces for y in (4, 60)]
    ties = [(c, sx, sy, k) for c in corners for sx in (-1, 1) for sy in (-1, 1) for k in (1, 2)]
    tie_start = np.array([(c[0] + sx, c[1] + sy) for c, sx, sy, _ in ties], float)
    tie_action = np.array([(-sx * k / 2, -sy * k / 2) for _, sx, sy, k in ties])
    return {
        "room": (uniform(100, room, room), normal(100, 1.2)),
        "wall_face": (at_face[:160], normal(160, 1.5)),
        "door": (opening[:140], normal(140, 2.0)),
        "door_corner": (corner, normal(110, 1.5)),
        "border": (border[:120], normal(120, 1.5)),
        "far": (uniform(60, room, room), normal(60, 12.0)),
        "solid": (solid, normal(25, 1.5)),
        "zero_component": (mixed, single),
        "zero": (np.concatenate([mixed[::10], exact[::10]]), np.zeros((29, 2))),
        "exact": (exact, lattice),
        "tie": (tie_start, tie_action),
    }


def record_transitions(public: types.SimpleNamespace, seed: int) -> Arrays:
    """Single steps: the state is set, one action executed."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {k: [] for k in ("state", "action", "next", "layout", "group")}
    names: list[str] = []
    for wall_x, door_y in LAYOUTS[:5:2]:  # the others are left to whole rollouts
        env = make_wall(public, wall_x, door_y)
        groups = draw_transitions(rng, wall_x, door_y)
        names = list(groups)
        for name, (states, actions) in groups.items():
            for state, action in zip(states, actions.astype(np.float32), strict=True):
                env.reset(torch.tensor(state))
                after = env.step(action)[3]["state"]
                assert after.dtype == torch.float64
                record = (state, action, after.numpy(), (wall_x, door_y), names.index(name))
                for values, value in zip(rows.values(), record, strict=True):
                    values.append(value)
    arrays = {name: np.array(values) for name, values in rows.items()}
    arrays |= {"layout": arrays["layout"].astype(np.int16), "names": np.array(names)}
    return arrays | {"group": arrays["group"].astype(np.uint8)}


def record_rollouts(public: types.SimpleNamespace, seed: int) -> Arrays:
    """25 steps with actions that keep their direction, so that walls and doors are met."""
    rng = np.random.default_rng(seed)
    starts, actions, states, layouts = [], [], [], []
    for wall_x, door_y in LAYOUTS:
        env = make_wall(public, wall_x, door_y)
        for index in range(8):
            start, goal = env.sample_random_init_goal_states(index)
            waypoints = np.array([(wall_x, door_y), goal])
            heading = waypoints[index % 2] - start
            drift = heading / np.linalg.norm(heading) * rng.uniform(0.6, 1.6)
            moves = (drift + rng.normal(0, 0.8, (25, 2))).astype(np.float32)
            starts.append(start)
            actions.append(moves)
            states.append(env.rollout(0, start, moves)[1])
            layouts.append((wall_x, door_y))
    arrays = {"start": starts, "action": actions, "state": states, "layout": layouts}
    return {name: np.array(values) for name, values in arrays.items()}


def record_non_finite(public: types.SimpleNamespace, seed: int) -> Arrays:
    """Ten steps of which the first divides by zero: straight into a border, or resting on one."""
    rng = np.random.default_rng(seed)
    first = [((20, 59.5), (0, 1)), ((50, 4.5), (0, -1)), ((4, 20), (0, 0)), ((20, 60), (0, 0))]
    starts = np.array([start for start, _ in first], float)
    actions = rng.normal(0, 2, (len(first), 10, 2)).astype(np.float32)
    actions[:, 0] = [action for _, action in first]
    env = make_wall(public, 32, 30)
    pairs = zip(starts, actions, strict=True)
    states = np.array([env.rollout(0, start, moves)[1] for start, moves in pairs])
    layouts = np.array([(32, 30)] * len(first))
    return {"start": starts, "action": actions, "state": states, "layout": layouts}


def record_frames(public: types.SimpleNamespace, seed: int) -> Arrays:
    """65-pixel boards of many states, and 224-pixel frames before any rounding of a few."""
    rng = np.random.default_rng(seed)
    states, layouts, boards, frames, framed = [], [], [], [], []
    for wall_x, door_y in LAYOUTS:
        env = make_wall(public, wall_x, door_y)
        special = [(wall_x, door_y), (4.3, 59.7), (wall_x - 3.3, door_y + 6.5), (40.5, 12.25)]
        for position in [*special, *rng.uniform(4.3, 59.7, (16, 2))]:
            state = np.array(position, float)
            frame = env.prepare(0, state)[0]["visual"]
            if len(boards) % 31 == 0:
                frames.append(frame.numpy())
                framed.append(len(boards))
            board = env.channels_to_img(env.wall_img, env.dot_img)
            boards.append(board.permute(1, 2, 0).numpy())
            states.append(state)
            layouts.append((wall_x, door_y))
    arrays = {"state": states, "layout": layouts, "board": boards, "frame": frames}
    return {name: np.array(values) for name, values in arrays.items()} | {"framed": framed}


def record_random_states(public: types.SimpleNamespace) -> Arrays:
    """Starts and goals by seed, of an environment built with a layout and of one moved to it."""
    seeds = [*range(40), 99, 12345, 2**16, 2**28 + 5, 2**30, 2**31 - 1, 2**31, 3**20, 2**32 - 2]
    seeds.append(2**32 - 1)
    layouts = [(32, 30), (24, 47)]
    arrays: Arrays = {"seed": np.array(seeds, np.int64), "layout": np.array(layouts)}
    for index, (wall_x, door_y) in enumerate(layouts):
        built, moved = make_wall(public, wall_x, door_y), make_wall(public, 32, 30)
        info = {"fix_wall_location": wall_x, "fix_door_location": door_y}
        moved.update_env({k: torch.tensor(v) for k, v in info.items()})
        for name, env in (("built", built), ("moved", moved)):
            pairs = [env.sample_random_init_goal_states(seed) for seed in seeds]
            arrays[f"{name}/{index}"] = np.array(pairs)
    return arrays


def record_success(public: types.SimpleNamespace, seed: int) -> Arrays:
    """The success rule around its edge of 4.5 pixels, and the distance it reports."""
    rng = np.random.default_rng(seed)
    env = make_wall(public, 32, 30)
    goals = np.round(rng.uniform(10, 54, (60, 2)) * 64) / 64
    radius = 4.5 + np.repeat([0, 1e-9, -1e-9, 1e-3, -1e-3, 2], 10)
    angle = np.where(np.arange(60) % 10 < 4, np.arange(60) % 4 * np.pi / 2, rng.uniform(0, 7, 60))
    offset = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    states = goals + np.where(np.abs(offset) < 1e-12, 0, offset)
    results = [env.eval_state(goal, state) for goal, state in zip(goals, states, strict=True)]
    return {
        "goal": goals,
        "state": states,
        "success": np.array([bool(r["success"]) for r in results]),
        "distance": np.array([float(r["state_dist"]) for r in results]),
    }
