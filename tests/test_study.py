"""study.py, mostly with a script that trains nothing and only leaves the files of a run."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from small_models import EVERY_HEAD

import results
import study

FAKE = """
import json, os, sys, time
flags = dict(arg.lstrip('-').split('=', 1) for arg in sys.argv[1:] if arg.startswith('--'))
out = flags['out_dir']
with open('ran.txt', 'a') as f:
    f.write(' '.join([os.path.basename(out), str(os.getpid()), *sys.argv[1:]]) + '\\n')
print('hello from', out)
if flags.get('seed') == '3' and not os.path.exists('mended'):
    raise SystemExit('seed 3 is unlucky')
if flags.get('seed') in ('4', '14'):
    open(os.path.join(out, 'ckpt.pt'), 'w').close()
    time.sleep(60)
if flags.get('seed') in ('5', '6'):
    open('here is ' + flags['seed'], 'w').close()
    while not os.path.exists('here is ' + str(11 - int(flags['seed']))):
        time.sleep(0.05)
if flags.get('seed') == '7' and not os.path.exists('more time'):
    open(os.path.join(out, 'ckpt.pt'), 'w').close()
    raise SystemExit(124)
with open(os.path.join(out, 'summary.json'), 'w') as f:
    json.dump({}, f)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """
    A folder with the fake training script, and a function that runs study.py on it, in this process, and returns the
    text that it prints.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "_ROOT", str(tmp_path))
    (tmp_path / "train_vision.py").write_text(FAKE)

    def run(*args, refused=False):
        monkeypatch.setattr(sys, "argv", ["study.py", "--out_dir=out", *args])
        message = ""
        if refused:
            with pytest.raises(SystemExit) as e:
                study.main()
            message = e.value.code
            assert isinstance(message, str)
        else:
            study.main()
        return "".join(capsys.readouterr()) + message

    return run


def ran():
    if not os.path.exists("ran.txt"):
        return []
    with open("ran.txt") as f:
        return [line.split() for line in f]


def names(**settings):
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setattr(study, key, value)
        return dict(study.grid())


def test_the_grid_has_every_combination_once():
    runs = names(heads="baseline,cosine,cosine:stable,minkowski:p=3", links="harmonic,softmin", ns="default,4,learn",
                 seeds="1,2", models="mlp,cnn")
    assert len(runs) == 2 * 2 * (1 + 2 * 2 * 3) # the baseline has neither link nor n, and cosine is its stable variant
    assert list(runs)[0] == "mlp_baseline_s1"
    assert [name for name in runs if name.endswith("_s1")] == list(runs)[:len(runs) // 2] # seed by seed
    assert runs["cnn_minkowski_standard_p3_softmin_n4_s2"] == [
        "--distance=minkowski", "--link=softmin", "--seed=2", "--model=cnn", "--distance_params=p=3", "--n=4"]
    assert runs["mlp_cosine_stable_nlearn_s1"] == [
        "--distance=cosine", "--link=harmonic", "--seed=1", "--model=mlp", "--variant=stable", "--learn_n=true"]
    everything = names(heads="all", seeds="7")
    assert len(everything) == 1 + len(EVERY_HEAD) # Minkowski comes twice
    assert all(name.endswith("_s7") for name in everything)


@pytest.mark.parametrize("settings, message", [
    (dict(heads="cosin"), "cosin"), (dict(heads="minkowski:p=0.5"), "p"), (dict(seeds="x"), "seeds is 'x'"),
    (dict(ns="many"), "ns is 'many': write numbers"), (dict(ns="0"), "ns is"), (dict(ns="nan"), "ns is"),
    (dict(links="soft"), "soft")])
def test_what_no_run_could_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        names(**settings)


def test_runs_are_processes_with_folders_and_what_has_ended_is_skipped(here):
    out = here("--heads=baseline,cosine", "--seeds=1,2", "--settings=--epochs=3")
    assert "4 runs in" in out and "4 of 4 have ended" in out
    assert [line[0] for line in ran()] == ["baseline_s1", "cosine_stable_s1", "baseline_s2", "cosine_stable_s2"]
    assert len({line[1] for line in ran()}) == 4 and all("--epochs=3" in line for line in ran())
    with open("out/cosine_stable_s2/log.txt") as f:
        assert "hello from out/cosine_stable_s2" in f.read()
    os.remove("out/baseline_s2/summary.json")
    assert "3 ended, 1 new; 1 to run" in here("--heads=baseline,cosine", "--seeds=1,2", "--settings=--epochs=3")
    assert len(ran()) == 5
    # ended runs of other settings are not taken for these
    out = here("--heads=baseline,cosine", "--seeds=1,2", "--settings=--epochs=4", refused=True)
    assert out.count("was made with other arguments") == 4 and "--epochs=3" in out and len(ran()) == 5


def test_a_broken_run_is_reported_and_retried_by_a_flag(here):
    out = here("--heads=baseline,cosine", "--seeds=1,3", refused=True)
    assert "2 broken, --retry runs them again" in out
    assert "out/cosine_stable_s3: exit status 1: seed 3 is unlucky" in out
    assert len(ran()) == 4 # the others have run
    out = here("--heads=baseline,cosine", "--seeds=1,3", refused=True)
    assert "2 ended, 2 broken; 0 to run" in out and len(ran()) == 4
    open("mended", "w").close()
    assert "4 of 4 have ended" in here("--heads=baseline,cosine", "--seeds=1,3", "--retry") and len(ran()) == 6


def test_a_damaged_folder_is_named_and_the_others_run(here):
    flags = ("--heads=baseline", "--seeds=1,2,8,9")
    here(*flags)
    for name in ("summary.json", "log.txt"):
        os.remove(f"out/baseline_s9/{name}")
    damages = {"baseline_s1": '["train_vision.py", "--se', "baseline_s2": '{"script": 3}'}
    for name, text in damages.items():
        with open(f"out/{name}/arguments.json", "w") as f:
            f.write(text)
    shutil.rmtree("out/baseline_s8")
    open("out/baseline_s8", "w").close() # a file in place of a folder
    before = {name: os.listdir(f"out/{name}") for name in damages}
    for retry in ("--retry=false", "--retry"):
        out = here(*flags, retry, refused=True)
        for part in ("3 damaged", "3 damaged, delete a folder to make its run again:\n", "s1/arguments.json cannot be",
                     "s2/arguments.json holds no list of arguments", "s8/arguments.json cannot be read ("):
            assert part in out
        assert "broken" not in out and before == {name: os.listdir(f"out/{name}") for name in damages}
    assert [line[0] for line in ran()[4:]] == ["baseline_s9"] # the one that is whole
    os.remove("out/baseline_s8")
    shutil.rmtree("out/baseline_s1")
    shutil.rmtree("out/baseline_s2")
    assert "1 ended, 3 new; 3 to run" in here(*flags)


def test_a_run_that_its_time_limit_ends_is_not_broken(here):
    out = here("--heads=baseline", "--seeds=7,8")
    assert "stopped: out/baseline_s7: the same command goes on" in out and "1 of 2 have ended" in out
    open("more time", "w").close()
    assert "1 ended, 1 stopped; 1 to run" in here("--heads=baseline", "--seeds=7,8")
    assert ran()[2][2:] == ["--init_from=resume", "--out_dir=out/baseline_s7"]


def test_a_run_that_another_process_makes_is_left_alone(here):
    fcntl = pytest.importorskip("fcntl")
    os.makedirs("out/baseline_s1")
    with open("out/baseline_s1/log.txt", "w") as f:
        f.write("of the other")
    with open("out/baseline_s1/lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        out = here("--heads=baseline", "--seeds=1,2")
        assert "left alone: out/baseline_s1: another process makes it" in out and "1 of 2 have ended" in out
        assert sorted(os.listdir("out/baseline_s1")) == ["lock", "log.txt"]
    assert "1 ended, 1 new; 1 to run" in here("--heads=baseline", "--seeds=1,2")
    assert [line[0] for line in ran()] == ["baseline_s2", "baseline_s1"]


def test_two_studies_at_once_run_nothing_twice(here):
    """Both have the same list when they begin, and come to runs that the other has made or is making."""
    names = [f"baseline_s{seed}" for seed in range(20, 40)]
    args = ["--heads=baseline", "--jobs=2", "--seeds=" + ",".join(name[10:] for name in names)]
    fork = multiprocessing.get_context("fork")
    studies = [fork.Process(target=here, args=args) for _ in range(3)]
    for process in studies:
        process.start()
    for process in studies:
        process.join(60)
    assert [process.exitcode for process in studies] == [0, 0, 0]
    assert sorted(line[0] for line in ran()) == names
    assert "20 ended; 0 to run" in here(*args)


def test_a_run_that_has_ended_since_the_study_began_is_not_made_again(here, monkeypatch):
    begin, folders = study.begin, []

    def others_first(folder, made_with): # what another study does in the meantime
        if folder not in folders:
            folders.append(folder)
            os.makedirs(folder)
            with open(os.path.join(folder, "arguments.json"), "w") as f:
                json.dump(made_with, f)
            with open(os.path.join(folder, "summary.json"), "w") as f:
                f.write("{}")
        return begin(folder, made_with)

    monkeypatch.setattr(study, "begin", others_first)
    assert "2 of 2 have ended" in here("--heads=baseline", "--seeds=1,2") and not ran()


def test_an_empty_error_is_a_line_too(here):
    here("--heads=baseline", "--seeds=3", refused=True)
    open("out/baseline_s3/error.txt", "w").close()
    assert "out/baseline_s3: error.txt is empty" in here("--heads=baseline", "--seeds=3", refused=True)


def test_a_folder_that_cannot_be_written_is_named_and_a_full_disk_stops_the_study(here):
    flags = ("--heads=baseline", "--seeds=1,2,8", "--jobs=1")
    os.makedirs("out/baseline_s1/log.txt") # a folder in place of a file
    out = here(*flags, refused=True)
    assert "broken: out/baseline_s1: it cannot be written (" in out and "2 of 3 have ended" in out
    shutil.rmtree("out")
    os.makedirs("out/baseline_s2")
    os.symlink("/dev/full", "out/baseline_s2/arguments.json.tmp")
    out = here(*flags, refused=True)
    assert "stopped after 1 of 3 runs: out/baseline_s2: it cannot be written ([Errno 28] No space left" in out
    assert "make room, and the same command goes on" in out and not os.path.exists("out/baseline_s8")
    assert os.listdir("out/baseline_s2") == ["claim"] # no .tmp either
    assert "1 ended, 2 new; 2 to run" in here(*flags)
    os.makedirs("out/baseline_s3")
    os.symlink("/dev/full", "out/baseline_s3/error.txt.tmp") # full while the run was made
    out = here("--heads=baseline", "--seeds=3", refused=True)
    assert "stopped after 0 of 1 runs" in out and not os.path.exists("out/baseline_s3/error.txt")
    open("mended", "w").close()
    assert "1 new; 1 to run" in here("--heads=baseline", "--seeds=3")


def test_dry_run_and_shards(here):
    def commands(*args):
        out = here("--heads=baseline,cosine,euclidean", "--seeds=1,2", "--dry-run", *args)
        return [line for line in out.splitlines() if "python train_vision.py" in line]

    everything = commands()
    assert len(everything) == 6 and not ran() and not os.path.exists("out")
    parts = [commands(f"--shard={i}/4") for i in (1, 2, 3, 4)]
    assert sorted(sum(parts, [])) == sorted(everything)
    assert max(map(len, parts)) == 2


# each waits for the other to begin
def test_several_runs_at_once(here):
    out = here("--heads=baseline", "--seeds=1,5,6,2", "--jobs=2")
    assert "4 new; 4 to run, 2 at once" in out and "4 of 4 have ended" in out


@pytest.mark.parametrize("has_gpu, cores, at_once", [(False, 3, 3), (False, 9, 4), (True, 3, 1)])
def test_how_many_run_at_once_unless_it_is_said(here, monkeypatch, has_gpu, cores, at_once):
    monkeypatch.setattr(study, "_HAS_GPU", has_gpu)
    monkeypatch.setattr(study, "cores", lambda: cores)
    out = here("--heads=baseline", "--seeds=1,2,8,9", "--dry-run", "--settings=--epochs=2")
    assert f"4 to run, {at_once} at once" in out
    # a run has one thread on a CPU, whatever runs beside it, unless the settings, which come later, say otherwise
    assert ("train_vision.py --threads=1 --epochs=2" in out) == (not has_gpu)


# Ctrl-C reaches the runs too; a scheduler's SIGTERM only the study
@pytest.mark.parametrize("stop", [
    lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)], ids=["ctrl-c", "sigterm"])
def test_a_stopped_study_takes_its_runs_along_and_goes_on(here, tmp_path, stop):
    for name in ("study.py", "configurator.py", "distances.py"): # a process group of its own
        (tmp_path / name).write_text(open(os.path.join(ROOT, name)).read())
    flags = ("--heads=baseline", "--seeds=1,4,14,8")
    process = subprocess.Popen([sys.executable, "study.py", "--out_dir=out", "--jobs=2", *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    for _ in range(300):
        if all(os.path.exists(f"out/baseline_s{seed}/ckpt.pt") for seed in (4, 14)):
            break
        time.sleep(0.1)
    stop(process.pid)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in out
    assert "stopped after 1 of 4 runs: the same command goes on" in out
    for seed in (4, 14):
        assert not os.path.exists(f"out/baseline_s{seed}/error.txt")
    assert len(ran()) == 3 and not os.path.exists("out/baseline_s8")
    for line in ran():
        with pytest.raises(ProcessLookupError): # the runs have stopped too
            os.kill(int(line[1]), 0)
    (tmp_path / "train_vision.py").write_text(FAKE.replace("time.sleep(60)", "pass"))
    assert "1 ended, 2 stopped, 1 new; 3 to run" in here(*flags, "--jobs=1")
    assert ran()[3][2:] == ["--init_from=resume", "--out_dir=out/baseline_s4"]


@pytest.mark.parametrize("args, message", [
    (["--shard=5/4"], "write i/k with 1 <= i <= k"),
    (["--shard=x"], "write i/k"),
    (["--jobs=-1"], "jobs is -1, it must be >= 0"),
    (["--script=bench.py"], "use train.py, train_vision.py or train_metric.py"),
    (["--base=config/none.py"], "there is no config/none.py"),
    (["--base='config/mlp.py"], "which does not split into words (No closing quotation)"),
    (["--settings='"], "which does not split into words (No closing quotation)"),
    (["--out_dir=train_vision.py"], "out_dir is 'train_vision.py', which is no folder"),
    (["--heads=cosine:eps=1"], "eps is no parameter of a distance"),
    (["--heads=cosin"], "cosin"),
    (["--seeds="], "the grid is empty"),
    (["--head=all"], "did you mean 'heads'?"),
])
def test_one_clear_message(here, args, message):
    out = here(*args, refused=True)
    assert message in out and not os.path.exists("out")


def test_real_runs_have_the_same_numbers_alone_and_side_by_side(tmp_path):
    rows = []
    for jobs in (1, 2):
        out = tmp_path / f"jobs{jobs}"
        command = [sys.executable, os.path.join(ROOT, "study.py"), "--heads=baseline,cosine", "--seeds=1",
                   f"--jobs={jobs}", f"--out_dir={out}", "--settings=--epochs=1 --plots=false"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        for name in ("baseline_s1", "cosine_stable_s1"):
            with open(out / name / "config.json") as f:
                info = json.load(f)
            assert (info["runs_at_once"], info["threads"], info["config"]["threads"]) == (jobs, 1, 1)
            assert any("which 2 runs shared" in note for note in results.read_run(out / name).notes) == (jobs == 2)
            with open(out / name / "summary.json") as f:
                summary = json.load(f)
            assert summary["test_accuracy"] > 0.5
            rows.append((name, summary["test_loss"], summary["test_accuracy"]))
    assert rows[:2] == rows[2:]
