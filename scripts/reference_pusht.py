"""What the public PushT does."""

from typing import Any

import numpy as np

Arrays = dict[str, Any]
SHAPES = ("T", "small_tee", "L", "Z", "square", "I", "+")
STEPS = 25


def make(wrapper: type, shape: str) -> Any:
    env = wrapper(with_velocity=True, with_target=True)
    env.update_env({"shape": shape})
    return env


def draw_starts(rng: np.random.Generator, count: int) -> np.ndarray:
    """States (count, 7): the agent near the block, at rest or moving; some blocks at a wall."""
    block = rng.uniform(120, 392, (count, 2))
    block[: count // 4, 0] = rng.choice([60.0, 452.0], count // 4)
    around = rng.uniform(0, 2 * np.pi, count)
    away = rng.uniform(60, 150, count)
    agent = block + away[:, None] * np.stack([np.cos(around), np.sin(around)], axis=1)
    agent = np.clip(agent, 25, 487)
    angle = rng.uniform(-np.pi, 3 * np.pi, count)
    velocity = rng.normal(0, 80, (count, 2)) * (rng.random((count, 1)) < 0.5)
    return np.concatenate([agent, block, angle[:, None], velocity], axis=1)


def draw_actions(rng: np.random.Generator, starts: np.ndarray) -> np.ndarray:
    """Actions (count, 25, 2) towards the block, then on past it, with noise; a few very large."""
    count = len(starts)
    heading = starts[:, 2:4] - starts[:, :2]
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    speed = rng.uniform(0.1, 0.6, (count, 1))
    actions = (heading * speed)[:, None] + rng.normal(0, 0.12, (count, STEPS, 2))
    actions[-2:] *= 3
    return actions.astype(np.float32).astype(np.float64)


def record(wrapper: type, seed: int) -> Arrays:
    """Rollouts and frames of every shape, random states by seed, the success rule."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {"shapes": np.array(SHAPES)}
    for shape in SHAPES:
        env = make(wrapper, shape)
        starts = draw_starts(rng, 24 if shape == "T" else 6)
        actions = draw_actions(rng, starts)
        visited = [env.rollout(0, s, a)[1] for s, a in zip(starts, actions, strict=True)]
        shown = starts[:6] if shape == "T" else starts[:1]
        frames = [env.prepare(0, state)[0]["visual"] for state in shown]
        arrays |= {
            f"{shape}/start": starts,
            f"{shape}/action": actions,
            f"{shape}/state": np.array(visited),
            f"{shape}/frame": np.array(frames),
        }
    return arrays | record_random_states(wrapper) | record_success(wrapper, seed)


def record_random_states(wrapper: type) -> Arrays:
    """Starts and goals by seed."""
    seeds = [*range(20), 99, 2**16, 2**28 + 5, 2**31, 2**32 - 1]
    env = make(wrapper, "T")
    pairs = [env.sample_random_init_goal_states(seed) for seed in seeds]
    return {"random/seed": np.array(seeds, np.int64), "random/state": np.array(pairs)}


def record_success(wrapper: type, seed: int) -> Arrays:
    """The success rule around its edges of 20 pixels and π/9, for goals drawn as above too."""
    rng = np.random.default_rng(seed)
    env = make(wrapper, "T")
    count = 200
    goal = np.concatenate(
        [rng.uniform(50, 450, (count, 4)), rng.uniform(0, 2 * np.pi, (count, 1))], axis=1
    )
    goal[count // 2 :, 4] = rng.normal(0, 2 * np.pi, count // 2) - np.pi
    offset = rng.normal(0, 1, (count, 4))
    length = 20 + np.tile([0, 1e-6, -1e-6, -3, 3], count // 5)
    offset *= (length / np.linalg.norm(offset, axis=1))[:, None]
    turn = np.repeat([1e-6, -1e-6, -0.1, 0.1], count // 4) + np.pi / 9
    turn *= rng.choice([-1, 1], count)
    state = np.concatenate([goal[:, :4] + offset, (goal[:, 4] + turn)[:, None]], axis=1)
    state[:, 4] %= 2 * np.pi
    zeros = np.zeros((count, 2))
    goal, state = np.concatenate([goal, zeros], 1), np.concatenate([state, zeros], 1)
    results = [env.eval_state(g, s) for g, s in zip(goal, state, strict=True)]
    return {
        "success/goal": goal,
        "success/state": state,
        "success/success": np.array([bool(r["success"]) for r in results]),
    }
