"""
What nobody thought of: settings, config files and damaged files by hypothesis, and the files of strangers. A few
hundred cases each time, the same ones; twenty times as many, and others each time, under `make torture`.

$ pytest tests/test_fuzz.py
$ pytest tests/test_fuzz.py -m torture
"""
import contextlib
import csv
import functools
import io
import json
import os
import pickle
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, SETTINGS, assert_same, defaults_of, flags, load, make_dataset, run_script
from hypothesis import strategies as st
from test_report import write_run

import configurator
import data_vision
import figures
import report
import report_figures
import run_folder
import study
from distances import DISTANCES
from families import load_run

# -----------------------------------------------------------------------------
# how cases are made

HEADS = ["baseline", *DISTANCES, *(f"{name}:{variant}" for name, variants in DISTANCES.items() for variant in variants)]
# every name that a distance's parameter, an argument of DistanceHead, or nothing has
PARAMETERS = ["p", "alpha", "T", "threshold", "min_denom", "weight_power", "reg_lambda", "momentum", "shrinkage", "A",
              "theta", "L", "covariance", "eps", "n", "learn_n", "link", "bias", "in_features", "num_prototypes",
              "num_classes", "device", "dtype", "distance", "variant", "self", "params", "noise", "", " p", "x"]
NUMBERS = ["-1", "0", "1", "2", "3", "64", "0.5", "1e-300", "5e-324", "-0.0", "1e3", "1e38", "1e39", "1e308", "1e400",
           "2147483648", "9223372036854775807", "100000000000000000000", "9" * 400, "9" * 5000, "nan", "inf", "-inf",
           "", "x", "true", "1_000", "９"]
WORDS = ["", "x", "none", "scratch", "resume", "gpt", "bert", "qwen2", "mlp", "cnn", "pixels", "vit_tiny", "tiny",
         "0.5B", "digits", "half", "mnist", "cifar10", "adam", "sgd", "step", "multistep", "cosine", "crop", "offline",
         "auto", "cpu", "cpu:x", "cpu:", "cpu:-1", "cpu:7", "cuda", "cuda:99999", "mps:1", "xla", "float16", "softmin",
         "USA", "usa", "..", "/dev/null", "/dev/null/x", "~", "\udce9", "é" * 300, "60,x", "1,2", ",", "[", "*",
         "gpt2", "'", "9" * 5000, "a=b", "--x", "%s", "{n}"]
numbers = st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(repr)
parameters = st.lists(st.tuples(st.sampled_from(PARAMETERS), numbers).map("=".join), max_size=2).map(",".join)
words = st.sampled_from(WORDS) | st.text(max_size=8)
heads = st.sampled_from(HEADS) | st.tuples(st.sampled_from(HEADS), parameters).map(":".join)


def values(key, default):
    """What a flag may be set to."""
    if key == "distance_params":
        return parameters | words
    if key in ("distance", "heads"):
        return heads | words
    if type(default) is bool:
        return st.sampled_from(["true", "false", "1", "", "2", "x"])
    return numbers if type(default) in (int, float) else words


def arguments(defaults, *without):
    """Lists of up to three flags of a script, of all but the settings `without`."""
    def flag(key):
        return values(key, defaults[key]).map(lambda value: f"--{key}={value}")
    keys = st.sampled_from([key for key in defaults if key not in without])
    return st.lists(keys.flatmap(flag), max_size=3)


# -----------------------------------------------------------------------------
# settings

SCRIPTS = ["train.py", "train_vision.py", "train_metric.py"]
TINY = {"train.py": ["--dataset=tiny", "--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16"],
        "train_vision.py": [], "train_metric.py": []}


@functools.cache
def check_phase(script):
    """A training script down to fail(problems), compiled."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as f:
        top, end, _ = f.read().partition("\nfail(problems)\n")
    return compile(top + end, os.path.join(ROOT, script), "exec")


def refusal(script, *argv):
    """The message of the script's report of problems, which is one line for each; None where it has none."""
    message = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [os.path.join(ROOT, script), *argv])
        try:
            exec(check_phase(script), {"__name__": "__main__", "__file__": sys.argv[0]})
        except SystemExit as e:
            message = e.code
    assert message is None or is_report(message)
    return message


def is_report(message):
    """Whether it says how many problems there are, and each in a line."""
    first, *lines = message.splitlines()
    has_count = first == f"this configuration cannot run, {len(lines)} to fix:"
    return has_count and len(lines) > 0 and all(line.startswith("  - ") for line in lines)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for a dataset; images are read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_vision, "load", functools.cache(data_vision.load))
    make_dataset(tmp_path / "data" / "tiny")
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_check_phase_refuses_or_accepts_any_flags(fuzz, folder, script):
    def check(args):
        refusal(script, *TINY[script], *args)
        assert os.listdir() == ["data"] # nothing was written
    fuzz(check, arguments(defaults_of(script)), cases=100)


# each of these raised, in the check phase or in the training that it let through
@pytest.mark.parametrize("script, flag, message", [
    ("train.py", "--block_size=0", "block_size is 0, it must be in [1, 10^9]"),
    ("train.py", "--max_iters=" + "1" + "0" * 20, "max_iters wants a number below 2^63, got 100000000000000000000"),
    ("train.py", "--max_iters=1e12", "max_iters is 1000000000000, it must be in [0, 10^9]"),
    ("train.py", "--learning_rate=" + "9" * 400, "learning_rate wants a number below 2^63"),
    ("train.py", "--feature_scale=nan", "feature_scale is nan, it must be >= 0 and finite"),
    ("train.py", "--distance=cosine:eps=1", "eps is no parameter of a distance but of every head"),
    ("train_vision.py", "--distance_params=in_features=2", "in_features is no parameter of a distance"),
    ("train_vision.py", "--eps=1e308", "eps must be below 1e19"),
    ("train_vision.py", "--distance=chebyshev:smooth:alpha=inf", "alpha must be finite, got inf"),
    ("train_vision.py", "--image_size=1e308", "image_size wants a number below 2^63, got 1e+308"),
    ("train_vision.py", "--image_size=2147483648", "image_size is 2147483648, it must be in [0, 10,000]"),
    ("train_vision.py", "--device=cpu:x", "device is 'cpu:x': use auto, cpu, cpu:0"),
    ("train_vision.py", "--min_improvement=inf", "min_improvement is inf, it must be in [0, 100)"),
    ("train_vision.py", "--min_improvement=100", "min_improvement is 100.0"),
])
def test_settings_that_raised_are_a_line_of_the_report(folder, script, flag, message):
    found = refusal(script, *TINY[script], flag)
    assert message in found and "1 to fix" in found


def test_digits_without_scikit_learn_are_a_line_of_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal("train_vision.py")


LINES = ["batch_size = {}", "learning_rate = {}", "out_dir = {}", "compile = {}", "distance = {}", "n = {}",
         "seed = {}", "nonsense = {}", "_helper = {}", "include({})", "__file__ = {}", "__builtins__ = {}",
         "include = {}", "raise {}", "del batch_size", "import os, math", "from math import inf", "def f(): return 1",
         "class A: pass", "for batch_size in range(3): pass", "exit()", "import sys; sys.exit('bye')",
         "assert False, 'a\\nb'", "1 / 0", "global batch_size", "while", "\tn = 1", "print(batch_size)", "x = y",
         "del __file__", "max_iters *= 10 ** 9"]
LITERALS = ["3", "0", "-1", "10 ** 20", "10 ** 5000", "1e308", "float('nan')", "'x'", "''", "b'x'", "None", "True",
            "[]", "{}", "1j", "lambda: 0", "type", "Exception", "'other.py'", "'config.py'", "'a\\0b'",
            "KeyError('a')", "SystemExit('x')", "type('A', (), {'__str__': None})()", "type('I', (int,), {})(3)",
            "..."]


def test_the_check_phase_refuses_or_accepts_any_config_file(fuzz, folder):
    pairs = st.tuples(st.sampled_from(LINES), st.sampled_from(LITERALS))
    lines = pairs.map(lambda pair: pair[0].replace("{}", pair[1]))
    texts = st.lists(lines, min_size=1, max_size=4).map("\n".join).map(str.encode)

    def check(text):
        (folder / "config.py").write_bytes(text)
        refusal("train.py", *TINY["train.py"], "config.py")
    (folder / "other.py").write_text("seed = 1e400")
    fuzz(check, texts | st.binary(max_size=20), cases=100)


def test_a_config_file_that_would_end_the_script_is_a_line_of_the_report(folder):
    (folder / "config.py").write_text("import sys\nsys.exit()")
    assert "config.py: SystemExit:  (line 2)" in refusal("train.py", *TINY["train.py"], "config.py")


# settings that would only take long, or much memory
LARGEST = dict(n_embd=64, intermediate_size=200, n_layer=3, n_head=8, n_kv_head=8, batch_size=1000, image_size=40,
               vocab_size=5000, max_iters=3, epochs=2, gradient_accumulation_steps=4, block_size=128)
SHORT = {"train.py": ["--max_iters=2", "--eval_interval=1", "--batch_size=2", "--gradient_accumulation_steps=1",
                      "--eval_iters=1", "--log_interval=1", "--compile=false"],
         "train_vision.py": ["--epochs=1", "--batch_size=512", "--plots=false", "--compile=false"],
         "train_metric.py": ["--epochs=1", "--batch_size=100"]}
ELSEWHERE = ("out_dir", "data_dir", "dataset", "init_from", "overwrite", "device", "dtype", "compile", "wandb_log",
             "plots", "track_emissions", "model")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_check_phase_accepts_trains_or_stops_in_a_line(fuzz, folder, script):
    fixed = ["--out_dir=out", "--overwrite=true", "--device=cpu", "--dtype=float32",
             "--track_emissions=false", *TINY[script], *SHORT[script]]

    def check(flags):
        too_large = []
        for flag in flags:
            key, _, value = flag[2:].partition("=")
            value = configurator.number(value)
            too_large.append(type(value) in (int, float) and value > LARGEST.get(key, value))
        if any(too_large) or refusal(script, *fixed, *flags):
            return
        try:
            run_script(script, *fixed, *flags)
        except SystemExit as e:
            if e.code != 124: # that of time_limit
                assert isinstance(e.code, str) and "not finite" in e.code and len(e.code.splitlines()) == 1
    fuzz(check, arguments(defaults_of(script), *ELSEWHERE), cases=15)


def test_a_study_refuses_or_lists_any_grid(fuzz, folder, monkeypatch):
    def check(flags):
        monkeypatch.setattr(sys, "argv", ["study.py", *flags, "--dry-run"])
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                study.main()
            except SystemExit as e:
                assert isinstance(e.code, str) and "to fix:\n" in e.code
        assert os.listdir() == ["data"]
    fuzz(check, arguments(defaults_of("study.py"), "dry_run", "measure"), cases=50) # which would train


def test_a_report_refuses_any_settings(fuzz, folder):
    def check(flags):
        with pytest.raises(SystemExit) as e:
            report.main(["data", *flags])
        assert isinstance(e.value.code, str) and os.listdir() == ["data"]
    fuzz(check, arguments(defaults_of("report.py")), cases=30)


# -----------------------------------------------------------------------------
# files

# what may stand in place of any value
ODD = [None, True, False, -1, 0, 3, 10 ** 15, 10 ** 400, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), "",
       "x", "a\nb", "\0", "\ud800", "$\\frac$", "x" * 300, "train.py", "eval", "nan", [], {}, [1], [[]], {"a": 1}]


def places(value):
    """All (container, key) within a value of dicts and lists."""
    found = []
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *places(value[key])]
    return found


def damaged(name, raw, kind, where, value, junk):
    """The bytes of a file, damaged in one place: `where` along it."""
    i = int(where * len(raw))
    if kind == "cut":
        return raw[:i]
    if kind == "flip":
        return raw[:i] + bytes(b ^ 1 << junk[0] % 8 for b in raw[i:i + 1]) + raw[i + 1:]
    if kind == "overwrite":
        return raw[:i] + junk + raw[i + len(junk):]
    if name.endswith(".csv"):
        cells = raw.decode().split(",")
        cells[int(where * (len(cells) - 1))] = str(value)
        return ",".join(cells).encode(errors="replace")
    if not name.endswith((".json", ".jsonl")):
        return raw[:i] + junk + raw[i:]
    whole = [json.loads(line) for line in (raw.splitlines() if name.endswith(".jsonl") else [raw])]
    found = places(whole)
    container, key = found[int(where * (len(found) - 1))]
    if kind == "drop":
        del container[key]
    else:
        container[key] = value
    return "\n".join(map(json.dumps, whole)).encode() + b"\n"


def damages(*names):
    """(the name of a file, the arguments of damaged but for the file's)"""
    kinds = st.sampled_from(["cut", "flip", "overwrite", "set", "set", "set", "drop"])
    return st.tuples(st.sampled_from(names), st.tuples(
        kinds, st.floats(0, 1), st.sampled_from(ODD), st.binary(min_size=1, max_size=16)))


def damage(folder, source, name, how):
    """Make folder anew as a copy of the folder source, where the file of that name is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / name
    path.write_bytes(damaged(name, path.read_bytes(), *how))


def quietly(main, *args):
    """main(*args) without what it prints: (what it printed to stdout, its message or None)."""
    out, message = io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore") # of matplotlib, about letters that its font lacks
        try:
            main(*args)
        except SystemExit as e:
            assert isinstance(e.code, str)
            message = e.code
    return out.getvalue(), message


@pytest.fixture
def families(tmp_path):
    """Three whole runs of each training script in the folder runs, and one of each in the folder source."""
    for script, dataset in (("train.py", "text"), ("train_vision.py", "digits")):
        for seed, distance in ((1, "baseline"), (2, "baseline"), (1, "cosine")):
            write_run(tmp_path / "runs" / f"{script}_{distance}_{seed}", seed, distance, 0.9 + seed / 100,
                      script=script, dataset=dataset)
        write_run(tmp_path / "source" / script, 1, "euclidean", 0.8, script=script, dataset=dataset)
    return tmp_path


def numbers_of_runs(folder):
    """{path: its numbers} of the runs in a report, without what other runs have a part in."""
    with open(folder / "report" / "tables" / "runs.csv", newline="", encoding="utf-8") as f:
        rows = {row["path"]: row for row in csv.DictReader(f)}
    for row in rows.values():
        del row["section"], row["head"]
    return rows


WRITTEN = SCRIPTS[:2] # by the fixture
RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "emissions.csv", "probe.npz")


def check_report(families, script, name, how):
    """The report of runs of which one is damaged: the others are in it as ever, and that one is named, if it is not."""
    bad = families / "runs" / "bad"
    damage(bad, families / "source" / script, name, how)
    _, message = quietly(report.main, [str(families / "runs"), f"--out_dir={families / 'report'}"])
    assert message is None
    found = numbers_of_runs(families)
    if str(bad) not in found:
        assert str(bad) in (families / "report" / "index.md").read_text()
    return {path: row for path, row in found.items() if path != str(bad)}


def test_a_damaged_run_changes_nothing_else_in_a_report(fuzz, families, monkeypatch):
    for name in ("figure_blocks", "small_multiples"): # they take most of the time
        monkeypatch.setattr(report_figures, name, lambda *args: [])
    quietly(report.main, [str(families / "runs"), f"--out_dir={families / 'report'}"])
    expected = numbers_of_runs(families)

    def check(case):
        assert check_report(families, *case[:1], *case[1]) == expected
    fuzz(check, st.tuples(st.sampled_from(WRITTEN), damages(*RUN_FILES)), cases=20)


def test_the_figures_of_a_report_with_a_damaged_run(fuzz, families):
    def check(case):
        check_report(families, *case[:1], *case[1])
    fuzz(check, st.tuples(st.sampled_from(WRITTEN), damages(*RUN_FILES)), cases=1)


def test_pictures_of_a_damaged_run_are_drawn_or_refused_in_a_line(fuzz, families):
    def check(case):
        script, (name, how) = case
        damage(families / "bad", families / "source" / script, name, how)
        _, message = quietly(figures.main, [str(families / "bad")])
        assert message is None or (str(families / "bad") in message and len(message.splitlines()) == 1)
    fuzz(check, st.tuples(st.sampled_from(WRITTEN), damages("config.json", "metrics.jsonl", "probe.npz", "best.pt")),
         cases=10)


def test_a_study_over_a_damaged_folder(fuzz, folder, monkeypatch):
    for name, text in (("arguments.json", '["train_vision.py", "--distance=baseline", "--link=harmonic", "--seed=1"]'),
                       ("error.txt", "exit status 1\nout of luck\n"), ("summary.json", "{}")):
        (folder / "source" / name).parent.mkdir(exist_ok=True)
        (folder / "source" / name).write_text(text)
    flags = ["study.py", "--out_dir=out", "--heads=baseline,cosine", "--seeds=1", "--dry-run"]
    monkeypatch.setattr(sys, "argv", flags)

    def check(case):
        damage(folder / "out" / "baseline_s1", folder / "source", *case)
        out, message = quietly(study.main)
        assert "2 runs in out" in out or "made with other arguments" in message
        study.why("out/baseline_s1")
    fuzz(check, damages("arguments.json", "error.txt", "summary.json"), cases=20)


RESUMED = ["--init_from=resume", "--out_dir=bad", "--max_iters=4", "--eval_interval=2"]


@pytest.fixture
def a_run(folder):
    """The folder `run` of a language model after two steps, and its weights."""
    run_script("train.py", *flags(**{**SETTINGS, "out_dir": "run", "max_iters": 2, "eval_interval": 1}))
    return folder / "run", load("run")["model"]


def test_a_damaged_checkpoint_is_one_line_or_the_same_weights(fuzz, a_run):
    run, weights = a_run

    def check(case):
        damage(run.parent / "bad", run, *case)
        try:
            model, _, _ = load_run("bad", "ckpt.pt")
        except SystemExit as e:
            assert isinstance(e.code, str) and "ckpt.pt" in e.code and len(e.code.splitlines()) == 1
        else:
            assert_same(dict(model.state_dict()), dict(weights))
    fuzz(check, damages("ckpt.pt"), cases=20)


def test_a_damaged_run_goes_on_or_is_refused_in_a_line(fuzz, a_run):
    run, _ = a_run

    def check(case):
        damage(run.parent / "bad", run, *case)
        before = {name: (run.parent / "bad" / name).read_bytes() for name in ("ckpt.pt", "best.pt")}
        if refusal("train.py", *RESUMED) is None:
            try:
                run_script("train.py", *RESUMED)
            except SystemExit as e:
                assert isinstance(e.code, str) and (len(e.code.splitlines()) == 1 or is_report(e.code)), e.code
                assert before == {name: (run.parent / "bad" / name).read_bytes() for name in before}
    fuzz(check, damages("config.json", "config.json", "metrics.jsonl", "ckpt.pt"), cases=15)


# -----------------------------------------------------------------------------
# files of strangers

class Bomb:
    """Its pickle makes the folder `ran` when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


CODE = "__import__('os').mkdir('ran')"


def saved(**options):
    """The bytes of a checkpoint with a bomb in it."""
    file = io.BytesIO()
    torch.save({"model": {"head.weight": Bomb()}, "model_args": {}, "config": {}, "step": 1}, file, **options)
    return file.getvalue()


def array_of_bombs(*names):
    """The bytes of an .npz file whose arrays hold a bomb each."""
    file = io.BytesIO()
    np.savez(file, **{name: np.array([Bomb()], object) for name in names})
    return file.getvalue()


def code_in_texts(raw):
    """JSON, or lines of it, in which every text is a line of Python."""
    lines = [json.loads(line) for line in raw.decode().splitlines() or ["{}"]]
    for container, key in places(lines):
        if isinstance(container[key], str):
            container[key] = CODE
    return "\n".join(map(json.dumps, lines)).encode()


def resume():
    run_script("train.py", "--init_from=resume", "--out_dir=run", "--max_iters=9", "--device=cpu", "--compile=false")


def train_from(name):
    def train():
        run_script("train.py", *TINY["train.py"], f"--init_from={name}", "--out_dir=new", "--device=cpu",
                   "--compile=false")
    return train


def make_report():
    report.main(["run", "--out_dir=report"])


BATCH = {b"data": Bomb(), b"labels": [0]}
HOSTILE = [ # (a file, its bytes or a function of those that are there, what reads it)
    ("data/tiny/meta.pkl", pickle.dumps({"vocab_size": Bomb()}, 2), lambda: refusal("train.py", *TINY["train.py"])),
    ("data/tiny/meta.pkl", pickle.dumps({"vocab_size": Bomb()}), lambda: refusal("train.py", *TINY["train.py"])),
    ("data/cifar10/data_batch_1", pickle.dumps(BATCH, 2), lambda: data_vision.load("cifar10")),
    ("data/mnist/images.npz", array_of_bombs("train_x", "train_y", "test_x", "test_y"),
     lambda: data_vision.load("mnist")),
    ("run/ckpt.pt", saved(), resume),
    ("run/ckpt.pt", saved(_use_new_zipfile_serialization=False), resume),
    ("run/ckpt.pt", pickle.dumps(Bomb()), resume),
    ("run/config.json", code_in_texts, resume),
    ("run/config.json", code_in_texts, make_report),
    ("run/metrics.jsonl", code_in_texts, make_report),
    ("run/summary.json", code_in_texts, make_report),
    ("run/emissions.csv", lambda raw: raw.replace(b"modelled", CODE.encode()), make_report),
    ("run/probe.npz", array_of_bombs("h", "y"), make_report),
    ("run/arguments.json", json.dumps([CODE]).encode(), lambda: study.saved_recipe("run")),
    ("run/best.pt", saved(), lambda: load_run("run")),
    ("run/best.pt", pickle.dumps(Bomb()), lambda: run_folder.read_prototypes("run")),
    ("ckpt.pt", saved(), train_from("ckpt.pt")), # as a checkpoint of nanoGPT
    ("weights/pytorch_model.bin", saved(), train_from("weights")), # as those of transformers
    ("weights/pytorch_model.bin", pickle.dumps(Bomb()), train_from("weights")),
    ("weights/evil.py", b"import os\nos.mkdir('ran')\n", train_from("weights")), # named in config.json
]


@pytest.mark.parametrize("name, content, read", HOSTILE, ids=[f"{i} {name}" for i, (name, *_) in enumerate(HOSTILE)])
def test_no_file_of_a_stranger_runs_code(folder, name, content, read):
    write_run(folder / "run", script="train.py", dataset="tiny", data_dir="data", block_size=16, n_layer=2, n_head=2,
              n_embd=16)
    (folder / "run" / "ckpt.pt").write_bytes(b"")
    (folder / "data" / "cifar10").mkdir()
    (folder / "data" / "cifar10" / "test_batch").write_bytes(pickle.dumps(BATCH))
    shape = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=97, n_positions=16, model_type="gpt2",
                 auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    os.mkdir("weights")
    (folder / "weights" / "config.json").write_text(json.dumps(shape))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with contextlib.suppress(SystemExit, Exception), contextlib.redirect_stdout(io.StringIO()):
        read()
    assert not os.path.exists("ran")


def test_a_bomb_goes_off(folder):
    pickle.loads(pickle.dumps(Bomb()))
    assert os.path.exists("ran")
    os.rmdir("ran")
    (folder / "config.py").write_text("import os\nos.mkdir('ran')") # a config file is code
    refusal("train.py", *TINY["train.py"], "config.py")
    assert os.path.exists("ran")


@pytest.mark.parametrize("name, content", [("ckpt.pt", saved()), ("ckpt.pt", b""), ("ckpt.pt", pickle.dumps([1])),
                                           ("weights/pytorch_model.bin", saved())])
def test_weights_that_do_not_load_are_one_line(folder, name, content):
    os.mkdir("weights")
    (folder / "weights" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}')
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match="does not load .*: it is damaged, holds no weights, or asks for code") as e:
        train_from(name.split("/")[0])()
    assert "weights_only" not in e.value.code # to turn that off is no advice
