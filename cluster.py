"""
Sends a study to Slurm as one array through submitit, a task for each run: what --launcher of study.py does.

A task makes its run as a study on its node would: it claims it, leaves it alone where another process makes it, and
goes on from its checkpoint. Slurm sends SIGURG 90 s before a task's time is over: the run is stopped and saved, and the
task queued again. Where Slurm itself ends a task and queues it again (preemption, scontrol requeue, a dead node), the
run was saved if it had the time for a step, and goes on from its last checkpoint if not. scancel ends it for good.
"""
import os
import shlex
import signal

# what asks a task to end and be queued again goes to all of its processes: only SIGURG does nothing to those that do
# not listen. submitit reads this when it is imported, here and in the task
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "URG"
import submitit  # noqa: E402 after the environment is set

import study  # noqa: E402
from configurator import number  # noqa: E402


def read(slurm):
    """Return the setting slurm as arguments of submitit's executor. Raises ValueError for what cannot be read."""
    found = {}
    for word in shlex.split(slurm):
        key, equals, value = word.partition("=")
        if not (key.isidentifier() and value):
            raise ValueError(f"slurm is {slurm!r}: write key=value pairs, separated by spaces, got {word!r}")
        found[f"slurm_{key}"] = number(value)
    if type(found.get("slurm_time")) is not int or found["slurm_time"] < 1: # submitit's default is 5 minutes
        raise ValueError(f"slurm is {slurm!r}: say how many minutes Slurm gives a run before it is queued again, such "
                         "as time=240")
    return found


class Runs(submitit.helpers.Checkpointable):
    """What a task does. Its checkpoint, by submitit, is the same call again."""

    def __call__(self, todo, at_once):
        """Make these runs, pairs of a folder and a recipe, one by one; so many, 0: unknown, share the machine."""
        requeue, task, asked = signal.getsignal(signal.SIGURG), os.getpid(), []

        def stop(signum, frame):
            if os.getpid() == task and not asked: # a forked run has this handler too
                asked.append(signum)
                raise KeyboardInterrupt
        signal.signal(signal.SIGURG, stop)
        cpus = os.cpu_count()
        fit = cpus // int(os.environ.get("SLURM_CPUS_ON_NODE", cpus)) # such tasks on this node
        at_once = at_once or max(fit, 1)
        broken = {}
        try:
            for run in todo:
                broken.update(study.run_all([run], at_once)[0])
        except (KeyboardInterrupt, SystemExit):
            if asked: # the run is saved
                requeue(signal.SIGURG, None)
            raise
        if broken: # for squeue and sacct: the task has failed
            raise SystemExit("\n".join(f"{folder}: {reason}" for folder, reason in broken.items()))


def send(launcher, slurm, todo, at_once, folder):
    """
    Send these runs to Slurm, or with the launcher 'local' to so many processes, each with its share. Returns the id of
    the array, or those of the processes, as a text; pickles and logs are in the folder. Raises SystemExit where there
    is no Slurm, or where it refuses.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [study._ROOT, os.environ.get("PYTHONPATH")])) # of the tasks
    try:
        if launcher == "local":
            executor = submitit.AutoExecutor(folder, cluster="local")
            executor.update_parameters(timeout_min=10**6)
            shares = [todo[i::at_once] for i in range(at_once)]
            return ", ".join(job.job_id for job in executor.map_array(Runs(), shares, [at_once] * at_once))
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**{"slurm_array_parallelism": at_once, "slurm_job_name": "study",
                                      "slurm_additional_parameters": {"requeue": True}, **read(slurm)})
        first, *_ = executor.map_array(Runs(), [[run] for run in todo], [0] * len(todo))
        return first.job_id.split("_")[0]
    except Exception as e: # no srun, another key or value, no such folder; sbatch refuses
        raise SystemExit(f"nothing was sent with slurm={slurm!r}: {' '.join(str(e).split())[:400]}") from None
