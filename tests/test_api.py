"""The README's Python runs, and the package loads without pulling everything in."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantwm as qwm
from quantwm.errors import MissingExtraError

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_readme_sketch_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert code.count("episodes=50") == 1
    assert code.count("episodes=8") == 1
    # Fewer episodes only; everything else runs as it is written.
    code = code.replace("episodes=50", "episodes=2").replace("episodes=8", "episodes=3")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"success [01]\.\d\d \[.*\], .* against float", printed)
    assert names["small"].quantization.method == "rtn"
    # Static inputs, calibrated; integer codes; and the float model untouched.
    layer = names["small"].get_submodule("encoder.blocks.3.mlp.fc1")
    assert layer.input_quantizer is not None
    assert type(names["world_model"].get_submodule("encoder.blocks.3.mlp.fc1")) is torch.nn.Linear


def test_every_public_name_is_there():
    for name in qwm.__all__:
        assert getattr(qwm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qwm.quantise


def test_importing_the_package_or_asking_for_help_does_not_import_torch():
    script = (
        "import sys, quantwm, quantwm.cli; "
        "from typer.testing import CliRunner; "
        "result = CliRunner().invoke(quantwm.cli.app, ['study', '--help']); "
        "assert result.exit_code == 0, result.output; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


def test_a_missing_package_reaches_other_processes_as_such():
    error = MissingExtraError("PushT", "pymunk", "tasks")
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is MissingExtraError
    assert str(sent) == str(error) == "PushT needs pymunk: pip install 'quantwm[tasks]'"


def test_loading_a_model_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    qwm.save(qwm.quantize(qwm.load("wall"), {"predictor.*": "w8"}), tmp_path / "small")
    qwm.load(tmp_path / "small")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_bundled_model_is_complete():
    world_model = qwm.load("wall")
    assert world_model.config.task == "wall"
    assert world_model.action_spec.mean is not None
    assert not world_model.training
    assert sum(p.numel() for p in world_model.predictor.parameters()) * 2 <= 14e6
    with torch.inference_mode():
        wall = qwm.get_task("wall")
        episodes = wall.episodes([1])
        latent = world_model.encode(wall.observe(episodes.start[:, None], episodes.layout))
    assert latent["visual"].shape == (1, 1, 49, 384)
