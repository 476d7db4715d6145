"""What the public PointMaze does."""

import sys
from typing import Any

import numpy as np

Arrays = dict[str, Any]
STEPS = 25


def record(wrapper: type, seed: int) -> Arrays:
    """Rollouts, frames, random states by seed, the success rule."""
    rng = np.random.default_rng(seed)
    env = make(wrapper)
    starts = draw_starts(env, 40)
    actions = draw_actions(rng, len(starts))
    rollouts = [env.rollout(0, s, a) for s, a in zip(starts, actions, strict=True)]
    arrays: Arrays = {
        "start": starts,
        "action": actions,
        "state": np.array([states for _, states in rollouts]),
        "frame": np.array([visited["visual"][-1] for visited, _ in rollouts[:8]]),
        "frame_state": np.array([states[-1] for _, states in rollouts[:8]]),
    }
    return arrays | record_random_states(env) | record_success(env, seed)


def make(wrapper: type) -> Any:
    """The environment as the public code registers it."""
    return wrapper(
        maze_spec=maze_of(wrapper),
        reward_type="sparse",
        reset_target=False,
        ref_min_score=0,
        ref_max_score=1,
        dataset_url="",
    )


def maze_of(wrapper: type) -> str:
    """The U maze, from the module of the wrapper's base class."""
    return sys.modules[wrapper.__mro__[1].__module__].U_MAZE


def draw_starts(env: Any, count: int) -> np.ndarray:
    """The public draw, velocities beyond the clip among them."""
    return np.array([env.sample_random_init_goal_states(seed)[0] for seed in range(count)])


def draw_actions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Actions (count, 25, 2) that keep their direction, so that walls are met; some beyond ±1."""
    drift = rng.normal(0, 0.6, (count, 1, 2))
    actions = drift + rng.normal(0, 0.5, (count, STEPS, 2))
    return actions.astype(np.float32).astype(np.float64)


def record_random_states(env: Any) -> Arrays:
    """Starts and goals by seed."""
    seeds = [*range(20), 99, 2**16, 2**28 + 5, 2**31, 2**32 - 1]
    pairs = [env.sample_random_init_goal_states(seed) for seed in seeds]
    return {"random/seed": np.array(seeds, np.int64), "random/state": np.array(pairs)}


def record_success(env: Any, seed: int) -> Arrays:
    """The success rule around its edge of 0.5."""
    rng = np.random.default_rng(seed)
    goal = rng.uniform(0.5, 3.1, (60, 4))
    radius = 0.5 + np.tile([0, 1e-9, -1e-9, 1e-3, -1e-3, 1], 10)
    angle = np.where(np.arange(60) < 12, np.arange(60) // 3 * np.pi / 2, rng.uniform(0, 7, 60))
    state = goal + 0
    state[:, 0] += radius * np.cos(angle)
    state[:, 1] += radius * np.sin(angle)
    state[:, 2:] = rng.normal(0, 3, (60, 2))
    results = [env.eval_state(g, s) for g, s in zip(goal, state, strict=True)]
    return {
        "success/goal": goal,
        "success/state": state,
        "success/success": np.array([bool(r["success"]) for r in results]),
    }
