"""
The bookkeeping of emissions.py: one real tracker for the whole file, fakes for what CodeCarbon may do wrong.

$ pytest tests/test_emissions.py
"""
import contextlib
import csv
import os
import socket
import sys
import time
from itertools import accumulate
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

import emissions
from emissions import PARTS, QUANTITIES, Emissions, grid_factor

codecarbon = pytest.importorskip("codecarbon")
from codecarbon.core import gpu, gpu_nvidia, hardware_cache  # noqa: E402 where there is a codecarbon


def rows_of(out_dir, name="emissions.csv"):
    with open(os.path.join(out_dir, name), newline="") as f:
        return list(csv.DictReader(f))


class Fake:
    """A tracker of 1e-3, 2e-3 and 1e-4 kWh (CPU, GPU, RAM) per call; `broken` says which calls go wrong, and how."""
    _hardware, broken = [], {}

    def __init__(self, output_handlers, **kwargs):
        self.handler, self.calls, Fake.kwargs = output_handlers[0], -1, kwargs # the first flush, at the start, gives 0

    def start(self):
        self.answer("start")

    def flush(self):
        self.answer("flush")

    def stop(self):
        self.answer("stop")
        self.handler.exit()

    def answer(self, name):
        if self.broken.get(name) == "raises":
            raise OSError(f"{name} failed")
        if name != "start" and self.broken.get(name) != "is silent":
            self.calls += 1
            n = self.calls
            self.handler.out(SimpleNamespace(cpu_energy=1e-3 * n, gpu_energy=2e-3 * n, ram_energy=1e-4 * n), None)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Fake)
    monkeypatch.setattr(Fake, "broken", {})
    return Fake


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Rows, totals and text of a real run under a hostile CodeCarbon configuration; no connection may be opened."""
    out_dir, connections = tmp_path_factory.mktemp("real"), []

    def refuse(*args, **kwargs):
        connections.append(args[1:])
        raise OSError("no network in tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        hostile = dict(ELECTRICITYMAPS_API_TOKEN="x", CO2_SIGNAL_API_TOKEN="x", PUE="3.0", OUTPUT_DIR="/no/where",
                       EMISSIONS_ENDPOINT="http://127.0.0.1:9", OUTPUT_METHODS="csv,api", TRACKING_MODE="process")
        for name, value in hostile.items():
            patch.setenv(f"CODECARBON_{name}", value)
        patch.chdir(out_dir)
        run, totals = Emissions(str(out_dir)), []
        for step in (0, 10, 20):
            until = time.perf_counter() + 0.2
            while time.perf_counter() < until:
                sum(i * i for i in range(10_000))
            totals.append(run.read(step, val_loss=3.0 - step / 10))
        time.sleep(0.1) # what happens between the last reading and the end counts too
        totals.append(run.stop(25))
        assert run.stop(30) == totals[-1] and run.read(35) == totals[-1]
    return SimpleNamespace(rows=rows_of(out_dir), totals=totals, text=run.describe(), files=os.listdir(out_dir),
                           connections=connections)


def test_real_totals_are_positive_monotone_and_the_sum_of_the_intervals(real):
    assert [row["step"] for row in real.rows] == ["0", "10", "20", "25"]
    for q in QUANTITIES:
        totals, intervals = ([float(row[f"{q}_{kind}"]) for row in real.rows] for kind in ("total", "interval"))
        assert totals == [t[f"{q}_total"] for t in real.totals] == list(accumulate(intervals))
        if q != "gpu_kwh":
            assert min(intervals) > 0 and totals == sorted(totals)
    last = real.totals[-1]
    assert last["energy_kwh_total"] == pytest.approx(sum(last[f"{part}_kwh_total"] for part in PARTS))
    assert 0.7 <= last["seconds_total"] < 20
    assert 0.5 < last["energy_kwh_total"] * 3.6e6 / last["seconds_total"] < 20_000 # watts, of some machine


def test_real_sources_factor_and_text(real):
    for row in real.rows:
        assert row["cpu_source"] in ("measured", "modelled") and row["ram_source"] in ("measured", "modelled")
        assert row["gpu_source"] in ("measured", "none")
        assert row["gpu_source"] == "measured" or float(row["gpu_kwh_total"]) == 0
        assert float(row["g_per_kwh"]) == grid_factor("USA")
        assert float(row["emissions_g_interval"]) == float(row["energy_kwh_interval"]) * float(row["g_per_kwh"])
    assert [row["val_loss"] for row in real.rows] == ["3.0", "2.0", "1.0", ""]
    assert "kWh" in real.text and "g CO2eq" in real.text and "g/kWh, USA" in real.text and "\n" not in real.text


def test_real_run_touches_no_network_and_leaves_no_other_file(real):
    assert real.connections == [] and real.files == ["emissions.csv"]


def test_carbon_intensity_is_the_factor(tmp_path, fake):
    run = Emissions(str(tmp_path), carbon_intensity=50.0)
    for step in range(3):
        run.read(step)
    for row in rows_of(tmp_path):
        assert float(row["g_per_kwh"]) == 50
        assert float(row["emissions_g_interval"]) == 50 * float(row["energy_kwh_interval"])
        assert float(row["emissions_g_total"]) == pytest.approx(50 * float(row["energy_kwh_total"]), rel=1e-12)
    assert fake.kwargs["force_carbon_intensity_g_co2e_kwh"] == 50 and "50 g/kWh, given" in run.describe()


def test_unknown_country_is_refused(tmp_path):
    for code in ("US", "usa", "Atlantis", ""):
        with pytest.raises(ValueError, match=f"country_iso_code '{code}'"):
            Emissions(str(tmp_path), country_iso_code=code)
    with pytest.raises(ValueError, match="did you mean 'USA'"):
        grid_factor("usa")
    for intensity in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="carbon_intensity"):
            grid_factor("USA", intensity)
    assert grid_factor("nowhere", 12.0) == 12.0 # one's own factor needs no country
    assert 10 < grid_factor("FRA") < grid_factor("USA") < grid_factor("POL") < 1000


def test_resume_continues_the_totals_and_marks_later_rows(tmp_path, fake, capsys):
    first = Emissions(str(tmp_path), carbon_intensity=100.0)
    totals = [first.read(step, val_loss=5.0 - step / 100) for step in (0, 100, 200, 300)]
    # it dies here without stop; its checkpoint is of step 200
    second = Emissions(str(tmp_path), carbon_intensity=100.0, resume_step=200)
    after = second.read(250, val_loss=2.0, lr=1e-3)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "100", "200", "300", "250"]
    assert [row["discarded"] for row in rows_of(tmp_path)] == ["0", "0", "0", "1", "0"]
    assert [row["lr"] for row in rows_of(tmp_path)] == ["", "", "", "", "0.001"]
    assert [row["val_loss"] for row in rows_of(tmp_path)] == ["5.0", "4.0", "3.0", "2.0", "2.0"]
    assert "0.0031 kWh went into steps beyond 200, which are made again" in capsys.readouterr().out
    for q in QUANTITIES[1:]: # what was lost was spent
        start, then, last = (t[f"{q}_total"] for t in (*totals[:2], totals[3]))
        assert after[f"{q}_total"] == pytest.approx(last + then - start)
    assert after["seconds_total"] > totals[3]["seconds_total"]
    # a later run with another factor leaves what was emitted as it is
    third = Emissions(str(tmp_path), carbon_intensity=1.0, resume_step=250).read(300)
    assert third["emissions_g_total"] == pytest.approx(after["emissions_g_total"] + 3.1e-3 * 1.0)
    assert [row["discarded"] for row in rows_of(tmp_path)] == ["0", "0", "0", "1", "0", "0"]
    assert "made again" not in capsys.readouterr().out # that is known already


def test_a_kill_loses_a_minute_of_energy_at_most(tmp_path, fake, monkeypatch):
    run = Emissions(str(tmp_path))
    run.read(0)
    run.note(1) # less than a minute later
    assert [row["step"] for row in rows_of(tmp_path)] == ["0"]
    monkeypatch.setattr(emissions, "NOTE_SECONDS", 0)
    for step in (2, 3): # the second in place of the first
        run.note(step)
    first, noted = rows_of(tmp_path)
    assert noted["step"] == "3" and float(noted["energy_kwh_interval"]) == pytest.approx(2 * 3.1e-3)
    # killed here, at a checkpoint of step 0; another one is read at step 4
    second = Emissions(str(tmp_path), resume_step=0)
    assert second.totals["energy_kwh"] == pytest.approx(3 * 3.1e-3) and second.rows[1]["discarded"] == 1
    run.read(4)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "4"]
    assert float(rows_of(tmp_path)[1]["energy_kwh_interval"]) == pytest.approx(3 * 3.1e-3)


def test_a_new_run_begins_a_new_file(tmp_path, fake):
    Emissions(str(tmp_path)).read(7)
    Emissions(str(tmp_path)).read(1)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1"]


@pytest.mark.parametrize("cut", [1, 5, 150, "header", "empty", "missing", "zeros", "garbage"])
def test_resume_from_a_damaged_file(tmp_path, fake, cut, capsys):
    first, path = Emissions(str(tmp_path)), tmp_path / "emissions.csv"
    totals = [first.read(step, note="x") for step in (10, 20)]
    text = path.read_bytes()
    header = text[:text.index(b"\n") + 1]
    damaged = {"header": text[:30], "empty": b"", "missing": b"", "zeros": text[:-20] + b"\0" * 20,
               "garbage": header + b"20,\xff,,\n1,2\n"}
    path.write_bytes(damaged[cut] if cut in damaged else text[:-cut])
    if cut == "missing":
        path.unlink()
    second = Emissions(str(tmp_path), resume_step=20)
    whole = cut in (1, 5, 150, "zeros") # the first row survives
    before = totals[0]["energy_kwh_total"] if whole else 0
    assert second.read(30)["energy_kwh_total"] == pytest.approx(3.1e-3 + before)
    assert [row["step"] for row in rows_of(tmp_path)] == (["10", "30"] if whole else ["30"])
    printed = capsys.readouterr().out
    assert ("totals begin at 0" in printed) == (not whole)
    assert ("cannot be read and are left out" in printed) == (cut in (1, 5, 150, "zeros", "garbage"))


@pytest.mark.parametrize("how", ["raises", "is silent"]) # CodeCarbon itself swallows exceptions: then nothing arrives
def test_a_failing_flush_costs_a_row_and_no_energy(tmp_path, fake, how, capsys):
    run = Emissions(str(tmp_path))
    before = run.read(10)
    fake.broken["flush"] = how
    assert run.read(20) == run.read(30) == before
    fake.broken.clear()
    assert run.read(40)["energy_kwh_total"] == pytest.approx(2 * before["energy_kwh_total"])
    fake.broken["stop"] = how
    run.stop(50)
    assert [row["step"] for row in rows_of(tmp_path)] == ["10", "40"]
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 and "step 20" in printed and "flush" in printed


@pytest.mark.parametrize("call", ["start", "flush"])
def test_a_tracker_that_does_not_start_is_off(tmp_path, fake, call, capsys):
    fake.broken[call] = "raises"
    run = Emissions(str(tmp_path))
    assert run.read(1) == run.stop(2) == {} and run.describe() == "no energy recorded" and os.listdir(tmp_path) == []
    assert len(capsys.readouterr().out.splitlines()) == 1
    fake.broken.clear()
    before = Emissions(str(tmp_path)).read(1)
    fake.broken[call] = "raises" # on resume the totals stay what they were
    run = Emissions(str(tmp_path), resume_step=1)
    assert run.read(2) == run.stop(3) == before and "CPU unknown" in run.describe()


def test_off_and_not_installed(tmp_path, monkeypatch, capsys):
    run = Emissions(str(tmp_path), enabled=False)
    assert run.read(1, val_loss=1.0) == run.stop() == {} and capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    run = Emissions(str(tmp_path))
    assert run.read(1) == run.stop() == {} and "pip install codecarbon" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_does_not_stop_the_run(tmp_path, fake, capsys):
    run = Emissions(str(tmp_path / "later"))
    assert run.read(10)["energy_kwh_total"] > 0 and "no row for step 10" in capsys.readouterr().out
    (tmp_path / "later").mkdir()
    run.read(20)
    assert [row["step"] for row in rows_of(tmp_path / "later")] == ["10", "20"] # the row was kept


def test_a_counter_that_resets_takes_nothing_back(tmp_path, fake):
    run = Emissions(str(tmp_path))
    totals = [run.read(10), run.read(20)]
    run.tracker.calls = -1
    totals += [run.read(30), run.read(40)]
    assert [t["energy_kwh_total"] / 3.1e-3 for t in totals] == pytest.approx([1, 2, 2, 3])


def test_the_last_row_of_a_stopped_run_and_nodes(tmp_path, fake):
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as closing:
        run = Emissions(str(tmp_path), node=1)
        closing.callback(run.stop)
        run.read(10)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["emissions_node1.csv"]
    assert [row["step"] for row in rows_of(tmp_path, "emissions_node1.csv")] == ["10", "10"]


@pytest.mark.parametrize("visible, counted", [
    (None, 11111111), ("3", 1000), ("0,7", 10000001), ("", 0), ("-1", 0), ("NoDevFiles", 0),
    ("GPU-5ab", 100000), ("GPU-1abc,6", 1000010)])
def test_a_run_counts_the_gpus_that_it_sees(tmp_path, monkeypatch, visible, counted):
    """A node of eight, by a driver that is none: the i-th GPU uses 10^i kWh between two readings."""
    hours, driver = [0], MagicMock()
    driver.nvmlDeviceGetCount.return_value = 8
    driver.nvmlDeviceGetHandleByIndex = lambda i: i
    driver.nvmlDeviceGetUUID = lambda i: f"GPU-{i}abc"
    driver.nvmlDeviceGetName.return_value = "H100"
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda i: hours[0] * 10**i * 3.6e9 # mJ
    driver.nvmlDeviceGetPowerUsage.return_value = driver.nvmlDeviceGetEnforcedPowerLimit.return_value = 300_000
    monkeypatch.setattr(gpu_nvidia, "pynvml", driver)
    monkeypatch.setattr(gpu, "PYNVML_AVAILABLE", True)
    monkeypatch.setattr(gpu, "is_nvidia_system", lambda: True)
    monkeypatch.setattr(hardware_cache, "_plans", {}) # of the trackers before, which had no GPU
    monkeypatch.setenv("CODECARBON_GPU_IDS", "0,1,2,3,4,5,6,7") # and a hostile configuration
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = Emissions(str(tmp_path))
    before = run.read(0)["gpu_kwh_total"]
    hours[0] += 1
    time.sleep(0.06) # CodeCarbon does not measure more often than every 50 ms
    assert run.read(1)["gpu_kwh_total"] - before == pytest.approx(counted)
    run.stop()


def test_sources_by_hardware():
    def item(kind, **fields):
        return type(kind, (), fields)()
    assert emissions.sources([]) == {"cpu": "none", "gpu": "none", "ram": "none"}
    assert emissions.sources([item("RAM"), item("CPU", _mode="cpu_load")]) == {
        "cpu": "modelled", "gpu": "none", "ram": "modelled"}
    assert emissions.sources([item("RAM"), item("CPU", _mode="constant")])["cpu"] == "modelled"
    assert emissions.sources([item("RAM"), item("CPU", _mode="intel_rapl"), item("GPU")]) == {
        "cpu": "measured", "gpu": "measured", "ram": "modelled"}
    chips = [item("RAM"), item("AppleSiliconChip", chip_part="CPU"), item("AppleSiliconChip", chip_part="GPU")]
    assert emissions.sources(chips) == {"cpu": "measured", "gpu": "measured", "ram": "modelled"}
