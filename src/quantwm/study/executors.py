"""Where a study's cells are computed: in this process, in several, or as jobs of a cluster.

All run the same worker (`quantwm.study.worker`) on the same folder, so that a study can be begun
with one and finished with another, and workers may die and be started again.
"""

import importlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from quantwm.compute import cores
from quantwm.errors import MissingExtraError, QuantWMError, UsageError
from quantwm.study.estimate import estimated_seconds
from quantwm.study.gate import gate_of
from quantwm.study.prepare import Prepared
from quantwm.study.spec import StudySpec
from quantwm.study.store import ResultsFolder
from quantwm.study.work import StudyProgress
from quantwm.study.worker import Job, work

logger = logging.getLogger(__name__)

Watch: TypeAlias = Callable[[], tuple[int, int]]
"""Looks at what is finished by now, (cells done, of how many); called again and again."""
ATTEMPTS = 3
"""How often a cluster's jobs are submitted for the same cells."""
KILLS = 10
"""How often workers may be killed in a row without any cell being finished in between."""


class Executor(Protocol):
    """Runs workers on a job until all its cells are finished or have failed."""

    @property
    def workers(self) -> int:
        """How many run at once on this machine; they share its cores."""
        ...

    @property
    def elsewhere(self) -> bool:
        """Whether they run on other machines, with devices that this one may lack."""
        ...

    def run(
        self, job: Job, prepared: Prepared, watch: Watch, progress: StudyProgress | None
    ) -> None:
        """Compute what is left of a job. Returns when nothing is left, or raises what stopped it.

        Args:
            job: all of it.
            prepared: its study.
            watch: called whenever something may have been finished.
            progress: shows how far it is.
        """
        ...


def shared_threads(spec: StudySpec, executor: Executor) -> StudySpec:
    """The study with this machine's cores shared among workers, unless it gives their threads."""
    if spec.threads is not None or executor.workers == 1:
        return spec
    return replace(spec, threads=max(1, cores() // executor.workers))


class InProcess:
    """One worker, in this process."""

    workers = 1
    elsewhere = False

    def run(
        self, job: Job, prepared: Prepared, watch: Watch, progress: StudyProgress | None
    ) -> None:
        """Work through the job, showing each arm's progress."""
        work(job, prepared=prepared, progress=progress, on_cell=watch)


@dataclass(frozen=True)
class Local:
    """Several worker processes on this machine.

    Workers take cells as they come free. On CUDA each takes the next GPU. A worker that is killed
    is started again. They are spawned, so that a script which runs a study with them needs the
    usual `if __name__ == "__main__":`.

    Attributes:
        workers: processes.
    """

    workers: int
    elsewhere = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")

    def run(
        self, job: Job, prepared: Prepared, watch: Watch, progress: StudyProgress | None
    ) -> None:
        """Start the workers and wait for them.

        Raises:
            QuantWMError: workers are killed again and again without finishing anything.
        """
        context = multiprocessing.get_context("spawn")
        kills, finished, folder = 0, (0, 0), ResultsFolder(job.folder)
        show = _bar(progress, f"{self.workers} workers")

        def start(index: int) -> BaseProcess:
            process = context.Process(
                target=_worker, args=(_on_device(job, prepared, index),), daemon=True
            )
            process.start()
            return process

        running = {index: start(index) for index in range(self.workers)}
        try:
            while running:
                time.sleep(min(job.poll, 0.2))
                done, total = watch()
                show(done, total)
                for index, process in list(running.items()):
                    if process.exitcode is None:
                        continue
                    del running[index]
                    if process.exitcode == 0:
                        continue
                    logger.warning("worker %d stopped with code %d", index, process.exitcode)
                    if process.exitcode > 0:
                        continue  # it said why
                    reached = done, folder.count_parts()
                    kills = kills + 1 if reached == finished else 1
                    finished = reached
                    if kills > KILLS:
                        raise QuantWMError(
                            f"workers were killed {kills} times in a row, perhaps for want of "
                            "memory: try fewer workers, or a smaller memory_budget"
                        )
                    running[index] = start(index)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()
            if progress is not None:
                progress.finish()


@dataclass(frozen=True)
class Slurm:
    """Jobs of a Slurm cluster, through submitit.

    Cells are put together to jobs of a sensible length. A job that runs out of time is submitted
    again and goes on with what is left of it; one that dies is replaced.

    Attributes:
        minutes: what a job should take, by the estimate of a dry run.
        timeout: minutes after which the cluster ends a job.
        most_jobs: jobs that run at once.
        parameters: for submitit, such as {"slurm_partition": "gpu", "cpus_per_task": 8}.
        cluster: "slurm", or "local" to run the jobs as processes here, as tests do.
    """

    minutes: float = 30.0
    timeout: int = 240
    most_jobs: int = 100
    parameters: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    workers = 1
    elsewhere = True

    def run(
        self, job: Job, prepared: Prepared, watch: Watch, progress: StudyProgress | None
    ) -> None:
        """Submit the reference arms, then all others, until nothing is left; or the diagnoses.

        Raises:
            GateError: the float arm fails; no job is submitted for quantized arms.
            QuantWMError: jobs end again and again without a result.
        """
        show = _bar(progress, f"{self.cluster} jobs")
        folder = ResultsFolder(job.folder)

        def left_of(names: Sequence[str]) -> Callable[[], list[Job]]:
            def left() -> list[Job]:
                still = [name for name in names if _is_open(name, prepared, folder)]
                return [replace(job, arms=part) for part in batches(still, prepared, self.minutes)]

            return left

        def diagnoses_left() -> list[Job]:
            done, total = watch()
            return [job] * min(self.most_jobs, total - done)

        quantized = [name for name in prepared.order if prepared.cells[name].quantized]
        references = [name for name in prepared.order if name not in quantized]
        try:
            if job.stage == "diagnoses":
                self._until_none_is_left(diagnoses_left, job, lambda: show(*watch()))
            else:
                self._until_none_is_left(left_of(references), job, lambda: show(*watch()))
                if any(_is_open(name, prepared, folder) for name in quantized):
                    gate_of(prepared, folder)
                self._until_none_is_left(left_of(quantized), job, lambda: show(*watch()))
        finally:
            if progress is not None:
                progress.finish()

    def _until_none_is_left(
        self, left: Callable[[], Sequence[Job]], job: Job, look: Callable[[], None]
    ) -> None:
        """Submit jobs for what is left, again and again while something is."""
        for _ in range(ATTEMPTS):
            jobs = left()
            if not jobs:
                return
            submitted = self._submit(job, jobs)
            while not all(one.done() for one in submitted):
                time.sleep(job.poll)
                look()
            look()
            errors = [error for one in submitted if (error := one.exception()) is not None]
            if errors:
                logger.warning("%d of %d jobs failed: %s", len(errors), len(submitted), errors[0])
        jobs = left()
        if jobs:
            arms = [name for one in jobs for name in one.arms or ()]
            what = f"{len(arms)} arms ({', '.join(arms[:3])}{', …' * (len(arms) > 3)})"
            raise QuantWMError(
                f"the jobs of {what if arms else 'the diagnoses'} ended {ATTEMPTS} times without a "
                f"result; their logs are in {self._logs(job)}"
            )

    def _submit(self, job: Job, parts: Sequence[Job]) -> Sequence[Any]:
        try:
            submitit = importlib.import_module("submitit")
        except ImportError as error:
            raise MissingExtraError("a study on a cluster", "submitit", "slurm") from error
        executor = submitit.AutoExecutor(folder=self._logs(job), cluster=self.cluster)
        settings = {"name": f"quantwm-{job.spec.name}", "timeout_min": self.timeout}
        if self.cluster == "slurm":
            settings["slurm_array_parallelism"] = self.most_jobs
        executor.update_parameters(**(settings | dict(self.parameters)))
        jobs: Sequence[Any] = executor.map_array(Resubmitted(), list(parts))
        return jobs

    def _logs(self, job: Job) -> Path:
        return job.folder / "logs"


class Resubmitted:
    """What a cluster's job runs; out of time it is submitted again, with the same job."""

    def __call__(self, job: Job) -> None:
        """Work through the job."""
        work(job)

    def checkpoint(self, job: Job) -> Any:
        """What submitit puts in the place of a job that ran out of time or was preempted."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self, job)


def batches(names: Sequence[str], prepared: Prepared, minutes: float) -> list[tuple[str, ...]]:
    """Arms in their order, put together so that each batch takes about so many minutes."""
    parts: list[list[str]] = []
    filled = 0.0
    for name in names:
        seconds = estimated_seconds(prepared.cells[name])
        if not parts or filled + seconds > minutes * 60:
            parts.append([])
            filled = 0.0
        parts[-1].append(name)
        filled += seconds
    return [tuple(part) for part in parts]


def _worker(job: Job) -> None:
    """What a process of `Local` runs; it ends with the process that started it, even if killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _bar(progress: StudyProgress | None, label: str) -> Callable[[int, int], None]:
    """One stage for all that workers do elsewhere."""
    if progress is None:
        return lambda _done, _total: None
    progress.start(label, 0, 0)
    return progress.update


def _on_device(job: Job, prepared: Prepared, index: int) -> Job:
    """The job with the GPU of a worker: the one that the study names, else the next in turn."""
    if prepared.device.type != "cuda":
        return job
    gpu = prepared.device.index
    if gpu is None:
        gpu = index % max(1, torch.cuda.device_count())
    return replace(job, spec=replace(job.spec, device=f"cuda:{gpu}"))


def _is_open(name: str, prepared: Prepared, folder: ResultsFolder) -> bool:
    id = prepared.cells[name].id
    return folder.load_cell(id) is None and folder.load_failure(id) is None
