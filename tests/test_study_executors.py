"""Workers that share a folder: claims, processes, a cluster's jobs, kill -9, versions, status."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantwm.compute import cores
from quantwm.errors import CellsFailedError, GateError, MismatchError, QuantWMError, UsageError
from quantwm.study import executors, plan_study, run_study
from quantwm.study.claims import Claims
from quantwm.study.executors import Local, Slurm, _on_device, batches, shared_threads
from quantwm.study.gate import gate_of
from quantwm.study.prepare import prepare
from quantwm.study.status import study_status
from quantwm.study.store import ResultsFolder
from quantwm.study.worker import Job, job_of, work
from study_support import (
    DyingModel,
    PointModel,
    PointTask,
    Recorder,
    by_arm,
    content,
    point_spec,
    study,
    study_in_parts,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The study of `point_spec`, run once by one worker without interruption."""
    return run_study(**study(), out=tmp_path_factory.mktemp("reference"))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def claiming(folder):
    """Processes that hold a claim in a study's folder."""
    for path in folder.glob("claims/*.claim"):
        with contextlib.suppress(FileNotFoundError):
            yield json.loads(path.read_text())["pid"]


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestClaims:
    def test_one_holder_at_a_time(self, tmp_path):
        claims = Claims(tmp_path / "claims")
        with claims.held("a") as first, claims.held("a") as second, claims.held("b") as other:
            assert (first, second, other) == (True, False, True)
            assert claims.holder("a")["pid"] == os.getpid()
        with claims.held("a") as again:
            assert again
        assert list((tmp_path / "claims").iterdir()) == []

    def test_of_many_at_once_one_wins(self, tmp_path):
        barrier, got = threading.Barrier(8), []

        def take():
            barrier.wait()
            with Claims(tmp_path).held("a") as free:
                got.append(free)
                time.sleep(0.3)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]

    @pytest.mark.parametrize("why", ["dead", "silent", "cut off"])
    def test_a_dead_workers_claim_is_taken_over(self, tmp_path, why):
        claims = Claims(tmp_path, stale=30)
        with claims.held("a"):
            path = next(tmp_path.glob("*.claim"))
            if why == "dead":
                rewrite(path, pid=dead_pid())
            elif why == "silent":
                rewrite(path, host="elsewhere")
                os.utime(path, (time.time() - 31,) * 2)
            else:
                path.write_text("{")
                os.utime(path, (time.time() - 31,) * 2)
            assert claims.holder("a") is None
            with claims.held("a") as free:
                assert free
                # The one who lost it must not remove the new one.
                assert path.exists()

    def test_a_claim_of_another_host_that_beats_is_respected(self, tmp_path):
        claims = Claims(tmp_path, heartbeat=0.05, stale=0.4)
        with claims.held("a"):
            rewrite(next(tmp_path.glob("*.claim")), host="elsewhere")
            time.sleep(0.8)
            with Claims(tmp_path, stale=0.4).held("a") as free:
                assert not free

    def test_a_loser_leaves_the_winners_claim(self, tmp_path):
        claims = Claims(tmp_path)
        with claims.held("a"):
            path = next(tmp_path.glob("*.claim"))
            rewrite(path, token="another's")
        assert path.exists()

    def test_an_unwritable_folder_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(QuantWMError, match="cannot write"),
            Claims(tmp_path / "file" / "claims").held("a"),
        ):
            pass


@pytest.mark.slow
def test_processes_give_the_rows_of_one_worker(tmp_path, reference):
    told = []
    result = run_study(
        **study(), out=tmp_path, executor=Local(2), on_arm=lambda arm: told.append(arm["arm"])
    )
    assert by_arm(result) == by_arm(reference)
    assert sorted(told) == sorted(arm.name for arm in point_spec().arms)
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.slow
# submitit lets go of the processes that it starts without waiting for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_jobs_of_a_cluster_give_the_rows_of_one_worker(tmp_path, reference, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the jobs find PointModel
    executor = Slurm(minutes=5e-4, timeout=5, cluster="local")
    result = run_study(**study(), out=tmp_path, executor=executor)
    assert by_arm(result) == by_arm(reference)
    assert len(list((tmp_path / "logs").glob("*_submitted.pkl"))) > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_jobs_of_a_cluster_heed_the_gate(tmp_path, monkeypatch):
    """Those of the reference arms are all that is submitted, once, and the oracles are heard."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    arms = ["oracle-state", "oracle-latent", "float", "w8", "oracle-latent:w4"]
    spec = point_spec(arms=arms, gate=0.9)
    arguments = {"world_model": PointModel(speed=-1.0), "task": PointTask()}
    executor = Slurm(timeout=5, cluster="local")
    with pytest.raises(GateError, match="oracle-state reaches"):
        run_study(spec, tmp_path, executor=executor, **arguments)
    assert len(list((tmp_path / "logs").glob("*_submitted.pkl"))) == 1
    assert len(list((tmp_path / "cells").iterdir())) == 3


def test_jobs_may_ask_for_a_device_that_only_the_nodes_have(tmp_path, monkeypatch):
    """Cells and jobs are of the nodes' GPU, which nothing here is asked to use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sent = []

    def submit(_executor, _job, parts):
        sent.extend(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(Slurm, "_submit", submit)
    arguments = study(point_spec(arms=["float", "w4"], device="cuda", dtype="auto"))
    with pytest.raises(KeyboardInterrupt, match="0 of 2 cells"):
        run_study(**arguments, out=tmp_path / "out", executor=Slurm())
    assert [(job.spec.device, job.spec.dtype, job.arms) for job in sent] == [
        ("cuda", "bfloat16", ("float",))
    ]
    plans = plan_study(**arguments, out=tmp_path / "out", elsewhere=True)
    assert [plan.arm for plan in plans] == ["float", "w4"]
    assert [plan.cell for plan in plans] == [
        arm.cell for arm in study_status(tmp_path / "out").arms
    ]
    with pytest.raises(UsageError, match="no CUDA device"):
        run_study(**arguments, out=tmp_path / "here")


DIAGNOSED = point_spec(diagnostics={"fidelity": True, "sensitivity": ["w2", "w3"], "episodes": 2})


def diagnoses_in(folder):
    return {p.name: json.loads(p.read_text()) for p in (folder / "diagnostics").iterdir()}


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """The diagnoses of one worker."""
    folder = tmp_path_factory.mktemp("diagnosed")
    run_study(**study(DIAGNOSED), out=folder)
    found = diagnoses_in(folder)
    assert len(found) > 3
    return found


@pytest.mark.slow
def test_processes_share_the_diagnoses(tmp_path, diagnosed):
    run_study(**study(DIAGNOSED), out=tmp_path, executor=Local(2))
    assert diagnoses_in(tmp_path) == diagnosed
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_jobs_of_a_cluster_make_the_diagnoses(tmp_path, diagnosed, monkeypatch):
    """They do, and not the process that submits, which on a cluster is no place to compute."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run_study(**study(point_spec()), out=tmp_path)
    for name in ("diagnose_fidelity", "diagnose_sensitivity"):
        monkeypatch.setattr(f"quantwm.study.diagnose.{name}", None)
    run_study(**study(DIAGNOSED), out=tmp_path, executor=Slurm(timeout=5, cluster="local"))
    assert diagnoses_in(tmp_path) == diagnosed


def test_a_diagnosis_that_another_worker_makes_is_waited_for(tmp_path, diagnosed):
    job = Job(DIAGNOSED, tmp_path, "all", world_model=PointModel(), task=PointTask(), poll=0.05)
    recorder = Recorder()

    def finish():
        time.sleep(1.0)
        name = "sensitivity-w2.json"
        (tmp_path / "diagnostics").mkdir(exist_ok=True)
        (tmp_path / "diagnostics" / name).write_text(json.dumps(diagnosed[name]))

    with Claims(tmp_path / "claims").held("sensitivity-w2"):
        thread = threading.Thread(target=finish)
        thread.start()
        work(job, progress=recorder)
        thread.join()
    assert "sensitivity to w3" in recorder.started
    assert "sensitivity to w2" not in recorder.started
    assert diagnoses_in(tmp_path) == diagnosed


def test_batches_keep_the_order_and_fill_up_to_the_time():
    prepared = prepare(**study(point_spec(arms=["float", "w8", "w4", "w3", "w2"])))
    names = list(prepared.cells)
    assert batches(names, prepared, 1e9) == [tuple(names)]
    assert batches(names, prepared, 1e-9) == [(name,) for name in names]
    some = batches(names, prepared, 2.5 * 6 * 3 * 16 * 2 * 3 * 3e-4 / 60)
    assert [len(part) for part in some] == [2, 2, 1]
    assert [name for part in some for name in part] == names


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_row(tmp_path, monkeypatch, reference):
    """Two workers, killed again and again; the study's own command puts the rest right."""
    assert reference.rows  # what the first study in a process imports is not timed
    spec, folder = point_spec(episodes=120), tmp_path / "killed"
    monkeypatch.setattr("quantwm.study.work.PART", 2)  # as `study_in_parts` does
    began = time.perf_counter()
    whole = run_study(**study(spec), out=tmp_path / "whole")
    longest = (time.perf_counter() - began) / 35  # work is left at the last kill
    # A server forks the workers, so that they need not import everything each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quantwm.study.run", "torch._dynamo", "pandas"])
    chance, kills = random.Random(0), 0
    for _ in range(12):
        workers = [context.Process(target=study_in_parts, args=(spec, folder)) for _ in range(2)]
        for worker in workers:
            worker.start()
        pids = {worker.pid for worker in workers}
        while workers[0].is_alive() and not pids & set(claiming(folder)):
            time.sleep(0.005)
        for worker in chance.sample(workers, 2):
            time.sleep(chance.uniform(0, longest))
            worker.kill()
            worker.join()
            kills += worker.exitcode == -signal.SIGKILL
    assert kills >= 20
    assert list(folder.glob("cells/*")) + list(folder.glob("parts/*/*"))  # they got somewhere
    assert by_arm(run_study(**study(spec), out=folder)) == by_arm(whole)


@pytest.mark.slow
def test_workers_that_get_on_may_be_killed_as_often_as_they_like(tmp_path, monkeypatch):
    """Each one dies with its first part; only those that finish nothing are given up."""
    monkeypatch.setattr(executors, "KILLS", 1)
    spec = point_spec(arms=["float"], episodes=30)
    died = run_study(
        spec, tmp_path, world_model=DyingModel(tmp_path), task=PointTask(), executor=Local(1)
    )
    whole = run_study(spec, tmp_path / "whole", world_model=PointModel(), task=PointTask())
    assert by_arm(died) == by_arm(whole)


@pytest.mark.slow
def test_workers_end_with_their_coordinator(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from quantwm.study import run_study; from quantwm.study.executors import Local;"
        "from study_support import point_spec, study;"
        "run_study(**study(point_spec(episodes=4096)), out=sys.argv[2], executor=Local(2))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    coordinator = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (claims := list(tmp_path.glob("claims/*.claim"))):
        assert coordinator.poll() is None
        time.sleep(0.05)
    pid = json.loads(claims[0].read_text())["pid"]
    assert pid != coordinator.pid
    coordinator.kill()
    coordinator.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_waits_for_what_another_computes(tmp_path, reference):
    """The other worker is this test: it holds a cell's claim, then finishes the cell."""
    spec = reference.spec
    job = Job(spec, tmp_path, world_model=PointModel(), task=PointTask(), poll=0.05)
    cell = prepare(**study()).cells["w4"].id
    seen = []

    def finish():
        time.sleep(1.0)
        seen.append((tmp_path / "cells" / f"{cell}.json").exists())
        source = reference.folder / "cells" / f"{cell}.json"
        (tmp_path / "cells" / f"{cell}.json").write_bytes(source.read_bytes())

    recorder = Recorder()
    with Claims(tmp_path / "claims").held(cell):
        thread = threading.Thread(target=finish)
        thread.start()
        work(job, progress=recorder)
        thread.join()
    assert seen == [False]
    assert "w4" not in recorder.started
    assert len(recorder.started) == 5


def test_workers_join_a_started_study(tmp_path, reference, monkeypatch):
    few = point_spec(arms=["float"])
    run_study(**study(few), out=tmp_path)
    job = job_of(tmp_path)
    assert job.arms is None
    assert job.spec.arms == few.arms
    with pytest.raises(MismatchError, match="holds no study to join"):
        job_of(tmp_path / "nowhere")
    other = replace(job, version=job.version | {"quantwm": "9.9"})
    with pytest.raises(MismatchError, match=r"quantwm 9\.9 there"):
        work(other)


def test_a_worker_of_another_configuration_is_refused(tmp_path):
    run_study(**study(point_spec(arms=["float"])), out=tmp_path)
    other = point_spec(arms=["float"], threads=2)
    with pytest.raises(MismatchError, match="threads: the folder has 1, this study 2"):
        work(Job(other, tmp_path, world_model=PointModel(), task=PointTask()))
    assert len(list((tmp_path / "cells").iterdir())) == 1


@pytest.fixture
def processor(monkeypatch):
    """Sets what this machine's processor is said to compute with."""
    return lambda name: monkeypatch.setattr("quantwm.study.same_study.cpu_arithmetic", lambda: name)


@pytest.mark.parametrize("executor", [None, Local(2)], ids=["one", "several"])
def test_processors_that_round_otherwise_are_refused(tmp_path, processor, executor):
    """The first worker says what a folder is computed with; a refused run changes nothing."""
    processor("amx")
    run_study(**study(point_spec(arms=["float"])), out=tmp_path)
    before = content(tmp_path)
    processor("avx2")
    more = study(point_spec(arms=["float", "w4"], threads=1))
    refusal = "processors with amx, this one computes with avx2"
    with pytest.raises(MismatchError, match=refusal):
        run_study(**more, out=tmp_path, executor=executor)
    with pytest.raises(MismatchError, match="--out"):
        work(Job(more["spec"], tmp_path, world_model=PointModel(), task=PointTask()))
    with pytest.raises(MismatchError, match=refusal):
        plan_study(**more, out=tmp_path)
    assert content(tmp_path) == before
    processor("amx")
    assert len(run_study(**more, out=tmp_path).summary) == 2


def test_who_only_submits_or_looks_may_compute_otherwise(tmp_path, processor, monkeypatch):
    def submit(_executor, _job, _parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(Slurm, "_submit", submit)
    processor("avx2")
    arguments = study(point_spec(arms=["float", "w4"]))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(**arguments, out=tmp_path, executor=Slurm())
        assert study_status(tmp_path).count("waiting") == 2
    assert not (tmp_path / "arithmetic").exists()
    processor("amx")
    work(Job(point_spec(arms=["float"]), tmp_path, world_model=PointModel(), task=PointTask()))
    assert (tmp_path / "arithmetic").read_text() == "amx"
    processor("avx2")
    assert [plan.done for plan in plan_study(**arguments, out=tmp_path, elsewhere=True)] == [
        True,
        False,
    ]


def test_a_folder_that_does_not_say_its_arithmetic_is_not_guessed(tmp_path):
    arguments = study(point_spec(arms=["float"]))
    run_study(**arguments, out=tmp_path)
    (tmp_path / "arithmetic").write_text("")  # a loss of power
    with pytest.raises(MismatchError, match="did not note its processor's arithmetic"):
        run_study(**arguments, out=tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    assert len(run_study(**arguments, out=tmp_path).summary) == 1
    assert (tmp_path / "arithmetic").read_text()


def test_workers_share_the_cores_unless_the_study_gives_threads():
    assert shared_threads(point_spec(threads=None), Local(2)).threads == max(1, cores() // 2)
    assert shared_threads(point_spec(threads=3), Local(2)).threads == 3
    assert shared_threads(point_spec(threads=None), Slurm()).threads is None


def test_each_worker_gets_a_gpu_unless_the_study_names_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    prepared = prepare(**study())
    job = Job(prepared.spec, Path("nowhere"))
    devices = [
        [
            _on_device(job, replace(prepared, device=torch.device(name)), i).spec.device
            for i in range(3)
        ]
        for name in ("cpu", "cuda", "cuda:1")
    ]
    assert devices == [["cpu"] * 3, ["cuda:0", "cuda:1", "cuda:0"], ["cuda:1"] * 3]


@pytest.mark.parametrize("arm", ["w8", "oracle-latent:w8"])
def test_a_worker_heeds_the_gate_unless_told_not_to(tmp_path, arm):
    spec = point_spec(arms=["float", arm], gate=1.0, task="point")
    job = Job(spec, tmp_path, world_model=PointModel(speed=-1.0), task=PointTask())
    with pytest.raises(GateError, match="below the gate"):
        work(job)
    assert len(list((tmp_path / "cells").iterdir())) == 1
    work(replace(job, gated=False))
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_a_failing_float_arm_is_judged_when_the_oracles_are_heard(tmp_path):
    """A worker that finds an oracle in another's hands waits for it, as quantized arms do."""
    arms = ["float", "oracle-state", "oracle-latent", "w8"]
    spec = point_spec(arms=arms, gate=1.0, task="point")
    job = Job(spec, tmp_path, world_model=PointModel(speed=-1.0), task=PointTask())
    work(replace(job, arms=("float", "oracle-state")))
    prepared, folder = job.prepared(), ResultsFolder(tmp_path)
    assert not gate_of(prepared, folder)
    work(replace(job, arms=("oracle-latent",)))
    with pytest.raises(GateError, match=r"oracle-latent 1\.00"):
        gate_of(prepared, folder)


def test_an_oracle_that_cannot_be_computed_is_not_waited_for(tmp_path):
    spec = point_spec(arms=["float", "oracle-latent", "w8"], gate=1.0, task="point")
    job = Job(spec, tmp_path, world_model=PointModel(speed=-1.0), task=PointTask())
    work(replace(job, arms=("float",)))
    prepared, folder = job.prepared(), ResultsFolder(tmp_path)
    folder.save_failure(
        prepared.cells["oracle-latent"].id, "oracle-latent", RuntimeError("none"), ""
    )
    with pytest.raises(GateError, match="Add the arms"):
        gate_of(prepared, folder)


def test_a_float_arm_that_cannot_be_computed_stops_the_study(tmp_path):
    with pytest.raises(CellsFailedError, match="float: RuntimeError"):
        run_study(
            **study(point_spec(arms=["float"])),
            out=tmp_path,
            progress=Recorder(break_at=1, error=RuntimeError("broken")),
        )


def test_status_counts_what_is_done_running_failed_and_waiting(tmp_path):
    with pytest.raises(CellsFailedError):
        run_study(
            **study(), out=tmp_path, progress=Recorder(break_at=4, error=RuntimeError("no luck"))
        )
    cells = prepare(**study()).cells
    for name in ("w4", "w2"):
        (tmp_path / "cells" / f"{cells[name].id}.json").unlink()
    with Claims(tmp_path / "claims").held(cells["w4"].id):
        found = study_status(tmp_path)
    states = {arm.arm: arm.state for arm in found.arms}
    assert states["float"] == "done"
    assert (states["w8"], states["w4"], states["w2"]) == ("failed", "running", "waiting")
    assert "3 done, 1 running, 1 failed, 1 waiting" in str(found)
    failed = next(arm for arm in found.arms if arm.state == "failed")
    assert failed.note == "RuntimeError: no luck"
    with pytest.raises(UsageError, match="holds no study"):
        study_status(tmp_path / "nowhere")


def test_workers_must_be_positive():
    with pytest.raises(UsageError, match="workers"):
        Local(0)
