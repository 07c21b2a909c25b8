"""
The repository as a package: what `pip install .` gives, in a fresh virtual environment and a folder of its own; and the
files about the repository, which name what there is.

$ pytest tests/test_install.py
"""
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, make_dataset

import command

ROOT = Path(ROOT)
GENERIC = ("data", "run", "model", "train", "metrics", "page", "command", "config")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the package, and with the packages of this one to lean on: the path of its bin."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source" # a copy, as building leaves files
    shutil.copytree(ROOT / "config", source / "config")
    names = [path.name for path in ROOT.glob("*.py")]
    for name in (*names, "pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages, = folder.glob("venv/lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = folder / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", source], check=True)
    return folder / "venv/bin"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of somebody whose own files are called as ours."""
    for name in GENERIC:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not the installed file')")
    make_dataset(tmp_path / "data/tiny")
    return tmp_path


def call(cwd, *arguments):
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_distances_is_a_module_everywhere_and_the_scripts_are_none(installed, tmp_path):
    code = ("import importlib.util, distances, distances_triton; from distances import DistanceHead; "
            "print(distances.__file__, DistanceHead(8, 5, 'cosine').kind); "
            f"print([name for name in {GENERIC} if importlib.util.find_spec(name)])")
    done = call(tmp_path, installed / "python", "-c", code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(str(installed.parent)) and first.endswith("cosine stable harmonic") and second == "[]"


def test_the_command_trains_anywhere(installed, elsewhere):
    flags = ("--dataset=tiny", "--max_iters=1", "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=16",
             "--batch_size=2", "--eval_iters=1", "--compile=false", "--track_emissions=false", "--out_dir=out")
    done = call(elsewhere, installed / "distance-heads", "train", "config/demo.py", *flags)
    assert done.returncode == 0 and "done: validation loss" in done.stdout, done.stdout + done.stderr
    assert "GPT: " in done.stdout and "cosine (stable)" in done.stdout # config/demo.py was found
    assert '"git": null' in (elsewhere / "out/config.json").read_text()
    package, = installed.parent.glob("lib/python*/site-packages/distance_heads")
    assert {path.name for path in ROOT.glob("*.py")} <= {path.name for path in package.glob("*.py")}
    assert {path.name for path in ROOT.glob("config/*.py")} == {path.name for path in package.glob("config/*.py")}
    assert (package / "LICENSE").exists() # export_hf.py copies it


def test_the_command_names_its_scripts(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["distance-heads", *arguments])
        command.main()
        assert "distance-heads prepare_stdlib|" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["distance-heads", "trian"])
    with pytest.raises(SystemExit, match="there is no script 'trian': use prepare_stdlib, .*train"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["distance-heads", "distances"])
    command.main()
    printed = capsys.readouterr().out
    runpy.run_path(str(ROOT / "distances.py"), run_name="__main__")
    assert printed == capsys.readouterr().out
    assert all((ROOT / f"{name}.py").exists() for name in command.SCRIPTS)


# -----------------------------------------------------------------------------
# files about the repository

def test_the_version_stands_in_one_place_and_the_lock_is_of_now():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"https?://([^/\"]+)", lock)) == {"pypi.org", "files.pythonhosted.org"}
    own, = (package for package in tomllib.loads(lock)["package"] if package["name"] == project["name"])
    assert own["version"] == project["version"]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines if line}
    for group in project["optional-dependencies"].values():
        declared |= {re.match(r"[\w-]+", line)[0] for line in group}
    assert {needed["name"] for needed in own["metadata"]["requires-dist"]} == declared
    for name in ("README.md", "CITATION.cff", "CONTRIBUTING.md", ".github/workflows/ci.yml"):
        assert not re.search(rf"\b{re.escape(project['version'])}\b", (ROOT / name).read_text()), name
    assert f"## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_the_gate_on_both_ends_of_the_range():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    oldest, newest = job["strategy"]["matrix"]["include"]
    assert ".ci/run" in job["steps"][-1]["run"]
    requires, = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest["python"] == requires
    low, high = re.findall(r"^torch>=([\d.]+),<([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert oldest["torch"] == low
    major, minor = map(int, newest["torch"].split("."))
    assert f"{major}.{minor + 1}" == high


def test_the_citation_names_software_and_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    links = {reference["url"] for reference in citation["references"]}
    readme = (ROOT / "README.md").read_text()
    assert len(links) >= 4 and all(link in readme for link in links)


def test_contributing_names_files_and_names_that_there_are():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w./]+\.(?:py|toml|txt|md))`", page)) - {"model_x.py"}
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    for name, file in (("DISTANCES", "distances"), ("FAMILIES", "families"), ("FAMILIES", "modeling_distance_head"),
                       ("CODE", "export_hf"), ("DATASETS", "data_vision"), ("STATS", "data_vision"), ("RANGES", "run")):
        assert re.search(rf"^{name} = ", (ROOT / f"{file}.py").read_text(), re.M), name
