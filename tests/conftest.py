"""
One thread per process, as the tensors are small, and threads that wait for each other make a busy machine crawl; and
the fixtures.
"""
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before anything imports transformers
os.environ["OMP_NUM_THREADS"] = "1" # of the scripts that the tests run
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1" # before anything imports triton: its kernels then run on the CPU
torch.set_num_threads(1)

from helpers import make_dataset  # noqa: E402 after the environment is set

import distances  # noqa: E402


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset(folder / "data" / "tiny")
    return folder


@pytest.fixture
def here(datasets, tmp_path, monkeypatch):
    """An empty folder, far from the scripts, with data/tiny in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(datasets / "data")
    return tmp_path


@pytest.fixture
def large(monkeypatch):
    """No batch is small: losses go chunk by chunk, and scores through the cores."""
    monkeypatch.setattr(distances, "SMALL", {"N x V x D": -1, "N x V": -1})
