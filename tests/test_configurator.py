"""
configurator.py knows the settings of a script and no others: these tests override them, and mistake them.

$ pytest tests/test_configurator.py
"""
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from configurator import configure, fail, find


def globals_of_a_script(**more):
    return {"__name__": "__main__", "os": os, "_private": 3, "a_list": [1], "nothing": None, "helper": len,
            "out_dir": "out", "batch_size": 12, "max_iters": 1000, "warmup_iters": 100, "learning_rate": 6e-4,
            "dropout": 0.0, "compile": True, "wandb_run_name": "gpt2", **more}


def refused(*args, **kwargs):
    with pytest.raises(SystemExit) as e:
        configure(globals_of_a_script(), *args, **kwargs)
    assert isinstance(e.value.code, str) # what Python prints to stderr before it exits with 1
    return e.value.code


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("config")

    def write(name, text):
        with open(os.path.join("config", name), "w", encoding="utf-8") as f:
            f.write(text)
        return os.path.join("config", name)
    return write


def test_defaults_are_the_public_scalars_and_stay_as_they_are():
    g = globals_of_a_script()
    config, sources = configure(g, [])
    keys = {"out_dir", "batch_size", "max_iters", "warmup_iters", "learning_rate", "dropout", "compile",
            "wandb_run_name"}
    assert set(config) == set(sources) == keys
    assert set(sources.values()) == {"default"} and all(g[key] == value for key, value in config.items())


def test_globals_are_updated_and_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=32"])
    g = globals_of_a_script()
    config, sources = configure(g)
    assert g["batch_size"] == config["batch_size"] == 32 and sources["batch_size"] == "command line"
    assert g["_private"] == 3 and g["a_list"] == [1]


@pytest.mark.parametrize("flag, value", [
    ("--dropout=0", 0.0), ("--dropout=1e-1", 0.1), ("--learning_rate=inf", float("inf")), ("--max_iters=1e5", 100_000),
    ("--max_iters=20.0", 20), ("--batch_size=-1", -1), ("--batch_size=9007199254740993", 9007199254740993),
    ("--compile=0", False), ("--compile=1", True), ("--compile=false", False), ("--compile=True", True),
    ("--compile=no", False), ("--compile=YES", True), ("--wandb_run_name=123", "123"), ("--wandb_run_name=a=b", "a=b"),
    ("--wandb_run_name=", ""), ("--wandb_run_name=1e5", "1e5"), ("--wandb_run_name=True", "True"),
    ("--wandb_run_name=--x", "--x")])
def test_promotions_of_a_flag(flag, value):
    key = flag[2:].split("=")[0]
    config, _ = configure(globals_of_a_script(), [flag])
    assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize("text, key, value", [
    ("dropout = 0", "dropout", 0.0), ("max_iters = 1e5", "max_iters", 100_000), ("compile = 0", "compile", False),
    ("wandb_run_name = 123", "wandb_run_name", "123"), ("max_iters = 2 * warmup_iters", "max_iters", 200),
    ("batch_size = 1e1; warmup_iters = batch_size * 3", "warmup_iters", 30),
    ("_n = 4\ndef _twice(x): return _n * x\nbatch_size = _twice(batch_size)", "batch_size", 48),
    ("import math, os.path\nbatch_size = math.gcd(12, 18)", "batch_size", 6),
    ("batch_size = sum(i for i in range(4)) + sum([i for i in range(4)])", "batch_size", 12),
    ("for _i in range(3): batch_size += _i", "batch_size", 15)])
def test_a_config_file_is_python(write, text, key, value):
    path = write("a.py", text)
    config, sources = configure(globals_of_a_script(), [path])
    assert config[key] == value and type(config[key]) is type(value) and sources[key] == path


@pytest.mark.parametrize("flag, wanted", [
    ("--batch_size=1.5", "an int"), ("--batch_size=true", "an int"), ("--batch_size=", "an int"),
    ("--max_iters=inf", "an int"), ("--dropout=none", "a float"), ("--compile=2", "true or false"),
    ("--compile=", "true or false")])
def test_wrong_type_of_a_flag(flag, wanted):
    message = refused([flag])
    assert flag[2:].split("=")[0] in message and f"wants {wanted}" in message and "command line" in message


@pytest.mark.parametrize("text", [
    'batch_size = "32"', "batch_size = None", "batch_size = True", "dropout = True", "dropout = [0.1]",
    "out_dir = None", 'out_dir = ["a"]', "compile = 3"])
def test_wrong_type_in_a_file(write, text):
    message = refused([write("a.py", text)])
    assert text.split()[0] in message and "wants" in message and "a.py" in message


def test_unknown_key_gets_the_nearest_name(write):
    assert "unknown key 'learning_rte', did you mean 'learning_rate'?" in refused(["--learning_rte=1e-3"])
    message = refused([write("a.py", "learning_rte = 1e-3")])
    assert "a.py: unknown key 'learning_rte', did you mean 'learning_rate'?" in message
    assert "did you mean 'batch_size'?" in refused(["--batchsize=8"])
    assert "did you mean" not in refused(["--zzz=1"])
    assert "_private" in refused(["--_private=1"]) # not a key
    assert "_like_this" in refused([write("b.py", "from math import gcd")])


def test_a_flag_says_how_it_is_written():
    assert "write --dropout=value, got '--dropout'" in refused(["--dropout"])
    assert "write --batch_size=32, got '-batch_size=32'" in refused(["-batch_size=32"])
    assert "write --batch_size=32 for a flag" in refused(["batch_size=32"])


def test_all_violations_come_in_one_report(write):
    path = write("a.py", "learning_rte = 1e-3\nbatch_size = 1.5\nmax_iters = 7")
    broken = write("broken.py", "batch_size = 4\nmax_iters = undefined_name")
    syntax = write("syntax.py", "batch_size = = 4")
    message = refused([path, broken, syntax, "config/missing.py", "--compil=1", "--dropout=x", "--dropout"])
    for part in ["8 to fix", "'learning_rte'", "batch_size wants an int, got 1.5", "NameError", "(line 2)",
                 "SyntaxError", "config/missing.py: no such config file", "'compil'", "dropout wants a float, got 'x'",
                 "write --dropout=value"]:
        assert part in message
    assert len(message.splitlines()) == 9


def test_a_script_adds_its_own_violations():
    problems = []
    config, _ = configure(globals_of_a_script(), ["--batch_sise=3", "--max_iters=0"], problems=problems)
    problems.append(f"max_iters must be positive, got {config['max_iters']}")
    with pytest.raises(SystemExit) as e:
        fail(problems)
    assert "batch_sise" in e.value.code and "max_iters must be positive" in e.value.code and "2 to fix" in e.value.code
    assert fail([]) is None


def test_flags_beat_files_and_later_files_beat_earlier_ones(write):
    a = write("a.py", "batch_size = 1; max_iters = 1; warmup_iters = 1")
    b = write("b.py", "batch_size = 2; max_iters = 2")
    for argv in (["--batch_size=3", a, b], [a, "--batch_size=3", b], [a, b, "--batch_size=3"]):
        config, sources = configure(globals_of_a_script(), argv)
        assert (config["batch_size"], config["max_iters"], config["warmup_iters"]) == (3, 2, 1)
        assert (sources["batch_size"], sources["max_iters"], sources["warmup_iters"]) == ("command line", b, a)
        assert sources["dropout"] == "default"
    assert configure(globals_of_a_script(), ["--batch_size=3", "--batch_size=4"])[0]["batch_size"] == 4


def test_a_file_sees_the_flags(write):
    path = write("a.py", "batch_size = 100; warmup_iters = 2 * batch_size\nmax_iters = {1: 10, 3: 30}[batch_size]")
    config, sources = configure(globals_of_a_script(), [path, "--batch_size=3"])
    assert (config["batch_size"], config["warmup_iters"], config["max_iters"]) == (3, 6, 30)
    assert sources["batch_size"] == "command line"
    assert "KeyError: 100" in refused([path])


def test_a_flag_without_a_value_is_true_and_dashes_are_underscores():
    config, _ = configure(globals_of_a_script(), ["--compile=0", "--compile", "--batch-size=3", "--wandb-run-name=a-b"])
    assert (config["compile"], config["batch_size"], config["wandb_run_name"]) == (True, 3, "a-b")


def test_a_mistyped_flag_is_named_with_the_one_that_was_meant():
    assert "unknown flag '--compil', did you mean --compile?" in refused(["--compil"])
    assert "unknown flag '--batchsize', did you mean --batch_size=value?" in refused(["--batchsize"])


def test_a_file_that_repeats_a_default_is_its_source(write):
    path = write("a.py", "batch_size = 12")
    assert configure(globals_of_a_script(), [path])[1]["batch_size"] == path


def test_include_is_relative_and_keeps_its_source(write):
    gpt2 = write("gpt2.py", "batch_size = 5; max_iters = 600; warmup_iters = 6")
    lines = ["batch_size = 7", "include('gpt2.py')", "max_iters = 2 * max_iters", "out_dir = f'out-{batch_size}'"]
    head = write("gpt2_cosine.py", "\n".join(lines))
    config, sources = configure(globals_of_a_script(), [head])
    assert (config["batch_size"], config["warmup_iters"]) == (5, 6)
    assert (config["max_iters"], config["out_dir"]) == (1200, "out-5")
    assert sources["batch_size"] == sources["warmup_iters"] == gpt2
    assert sources["max_iters"] == sources["out_dir"] == head
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    assert configure(globals_of_a_script(), [os.path.join("..", head)])[0]["batch_size"] == 5


def test_include_reports_what_is_wrong_in_the_included_file(write):
    write("gpt2.py", "batch_sise = 5")
    message = refused([write("a.py", "include('gpt2.py')\ninclude('gpt3.py')")])
    assert f"{os.path.join('config', 'gpt2.py')}: unknown key 'batch_sise'" in message
    assert f"{os.path.join('config', 'gpt3.py')}: no such config file" in message
    loop = write("loop.py", "include('loop.py')\n" * 2)
    assert refused([loop]).count(f"{loop} includes itself") == 2
    write("a.py", "include('b.py')")
    path = write("b.py", "include('a.py')")
    assert f"{path} includes itself" in refused([path])


def test_configs_of_the_scripts_are_found_from_any_folder(write):
    g = {"distance": "baseline", "model": "gpt"}
    path = os.path.join("config", "heads.py")
    assert find(path) == os.path.join(ROOT, path) and os.path.exists(find(path))
    assert "configurator.py: no such config file" in refused(["configurator.py"]) # a script is no config
    write("heads.py", "distance = 'cosine'") # one's own comes first
    assert configure(g, [path]) == ({"distance": "cosine", "model": "gpt"}, {"distance": path, "model": "default"})


def test_base_lies_between_defaults_and_files(write):
    path = write("a.py", "max_iters = 3 * warmup_iters")
    base = {"warmup_iters": 7, "max_iters": 9, "batch_size": 4, "dropout": 0}
    config, sources = configure(globals_of_a_script(), [path, "--batch_size=5"], base=base, base_name="out/config.json")
    assert (config["warmup_iters"], config["max_iters"], config["batch_size"]) == (7, 21, 5)
    assert type(config["dropout"]) is float
    keys = ("warmup_iters", "max_iters", "batch_size", "out_dir")
    assert [sources[key] for key in keys] == ["out/config.json", path, "command line", "default"]
    message = refused([], base={"batch_sise": 4}, base_name="out/config.json")
    assert "out/config.json: unknown key 'batch_sise'" in message


def test_a_second_call_starts_from_the_same_defaults(write):
    path, g = write("a.py", "max_iters = 2 * max_iters"), globals_of_a_script()
    first, second = configure(g, [path]), configure(g, [path])
    assert first == second and g["max_iters"] == 2000
    config, _ = json.loads(json.dumps(first)) # what a run folder keeps is a base as it is
    assert configure(g, [], base=config, base_name="saved")[0]["max_iters"] == 2000


SCRIPT = '''"""
Trains nothing.

$ python script.py --n=2
"""
import os
from configurator import configure
# -----
# model
n = 1 # how many
rate = 6e-4 # learning rate, per step
# data
name = 'a b' # any text
_hidden = 1
# -----
config, sources = configure(globals())
after = 5
print(os.path.basename(__file__), n, rate, name, sources['n'])
'''


def test_in_a_process_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def script(*args):
        env = {**os.environ, "PYTHONPATH": ROOT}
        command = [sys.executable, str(tmp_path / "script.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)

    done = script("--n=2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "script.py 2 0.0006 a b command line\n", "")
    done = script("--m=2", "--rate=x")
    assert done.returncode == 1 and done.stdout == "" and "'m'" in done.stderr and "rate wants a float" in done.stderr
    assert "Traceback" not in done.stderr
    for args in (["--help"], ["-h"], ["--nonsense", "-h"]):
        done = script(*args)
        assert (done.returncode, done.stderr) == (0, "")
        settings = SCRIPT.splitlines()[7:14] # from the first one's headline to before the rule
        assert done.stdout == "\n".join(["Trains nothing.", "", "$ python script.py --n=2", "", *settings]) + "\n"
