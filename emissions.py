"""
Energy and CO2eq of a run: one CodeCarbon tracker per node, read at intervals into <out_dir>/emissions.csv.

    emissions = Emissions(out_dir, country_iso_code="USA") # on LOCAL_RANK 0 of each node: each would count it again
    log.update(emissions.read(step, val_loss=val_loss))    # at each evaluation
    emissions.note(step)                                   # at each log line, for what a kill -9 would take along
    print(emissions.describe())
    emissions.stop(step)                                   # however the run ends, so that a crash keeps its energy

The tracker counts the GPUs that CUDA_VISIBLE_DEVICES names, all if it is not set, and the whole machine's CPUs and RAM,
whoever else uses them: several runs on one node, each with a GPU, have each its own GPU's energy. Energy is "measured"
where a counter gives it (RAPL, NVML, PowerMetrics, ...) and "modelled" where CodeCarbon infers it: the CPU's from its
TDP and load, the RAM's from its size. The energy of the GPU is therefore the cleanest comparison between heads. CO2eq
is kWh times one factor, fixed for the run.

A run on several nodes has one tracker and one file per node (emissions.csv on node 0, emissions_node1.csv, ...).
Nothing here adds them up: one would all-reduce the energy_kwh_total and emissions_g_total that read() returns, with
zeros from the ranks without a tracker.

Columns: step, timestamp (UTC), g_per_kwh, {cpu,gpu,ram}_source; for each of seconds, cpu_kwh, gpu_kwh, ram_kwh,
energy_kwh (their sum) and emissions_g: <name>_interval, since the row before, and <name>_total, since step 0 of the
run; discarded, 1 where a kill undid the steps of the row, which were made again: their energy was spent and stays in
the totals; then what read() was given. A reading that fails makes no row; the next row's interval covers its time.
"""
import csv
import io
import os
import tempfile
import time
from datetime import UTC, datetime
from difflib import get_close_matches
from types import SimpleNamespace

from data import replacing
from safe import say

os.environ.setdefault("CODECARBON_LOG_LEVEL", "critical") # its first import already logs
PARTS = ("cpu", "gpu", "ram")
QUANTITIES = ("seconds", "cpu_kwh", "gpu_kwh", "ram_kwh", "energy_kwh", "emissions_g")
NOTE_SECONDS = 60 # between two writings of the file, at most: what a kill -9 takes along
COUNTERS = ("intel_rapl", "windows_emi", "intel_power_gadget") # CodeCarbon's CPU modes that read a counter


def grid_factor(country_iso_code, carbon_intensity=0.0):
    """
    Grams of CO2eq per kWh: carbon_intensity if > 0, else the country's average in CodeCarbon's own data. Raises
    ValueError for a negative carbon_intensity or a country code that is not in the data, and ImportError without
    codecarbon.
    """
    if not 0 <= carbon_intensity < float("inf"):
        raise ValueError(f"carbon_intensity is in g CO2eq per kWh, 0 for the country's own, got {carbon_intensity}")
    if carbon_intensity > 0:
        return carbon_intensity
    from codecarbon.input import DataSource
    mix = DataSource().get_global_energy_mix_data()
    if country_iso_code not in mix:
        close = get_close_matches(country_iso_code.upper(), mix, n=1)
        hint = f"did you mean {close[0]!r}? or " if close else ""
        raise ValueError(f"country_iso_code {country_iso_code!r} is not one of the {len(mix)} three-letter codes that "
                         f"CodeCarbon knows, {hint}set carbon_intensity to your grid's g CO2eq per kWh")
    return float(mix[country_iso_code]["carbon_intensity"])


def visible_gpus():
    """
    The GPUs that CUDA_VISIBLE_DEVICES names, by index, or None where it is not set. CodeCarbon reads it too, but takes
    an empty one for all GPUs of the node, and does not find a GPU by its UUID, whose energy is then 0.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    from codecarbon.core.gpu import AllGPUDevices
    found = []
    for name in names.split(","):
        if name.strip().isdigit():
            found.append(int(name))
        elif name.startswith("GPU-"): # a UUID, or its beginning
            gpus = AllGPUDevices().get_gpu_static_info()
            found += [gpu["gpu_index"] for gpu in gpus if gpu["uuid"].startswith(name)]
    return found


class Emissions:
    """
    The tracker of a node and its file.

    country_iso_code, carbon_intensity: see grid_factor, whose ValueError comes through. With enabled=False, or without
    codecarbon, every call does nothing and read() returns {}. resume_step: None begins a new file; a step continues the
    totals of the existing one, whose rows beyond that step are marked as discarded. node: torchrun's GROUP_RANK. After
    the constructor nothing raises: what CodeCarbon cannot do is printed once, and training goes on.
    """

    def __init__(self, out_dir, country_iso_code="USA", carbon_intensity=0.0, enabled=True, resume_step=None, node=0):
        self.path = os.path.join(out_dir, f"emissions_node{node}.csv" if node else "emissions.csv")
        self.tracker, self.warned, self.step, self.rows = None, False, 0, []
        self.sources = dict.fromkeys(PARTS, "unknown")
        self.totals = dict.fromkeys(QUANTITIES, 0.0) # of the run, since step 0
        self.seen = dict.fromkeys(QUANTITIES[:4], 0.0) # of this process, at the last row
        self.noted = time.monotonic() # when the file was written
        if not enabled:
            return
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            say("emissions: codecarbon is not installed, energy is not recorded (pip install codecarbon)")
            return
        self.factor = grid_factor(country_iso_code, carbon_intensity)
        self.origin = "given" if carbon_intensity > 0 else country_iso_code
        if resume_step is not None:
            self.resume(resume_step)
        try:
            self.scratch = tempfile.TemporaryDirectory() # some backends write a log of their own
            handler = SimpleNamespace(out=self.receive, exit=lambda: None)
            # everything that could reach the network or change the numbers is said here, as a ~/.codecarbon.config
            # might say otherwise. A thread samples power every second; api_call_interval=-1 keeps it from the handler
            tracker = OfflineEmissionsTracker(
                country_iso_code=country_iso_code, force_carbon_intensity_g_co2e_kwh=self.factor, pue=1.0,
                tracking_mode="machine", gpu_ids=visible_gpus(), output_methods=[], output_handlers=[handler],
                output_dir=self.scratch.name, emissions_endpoint=None, api_call_interval=-1, allow_multiple_runs=True)
            tracker.start()
            self.started = time.perf_counter()
            self.measure(tracker.flush) # proves the whole chain, and pays for its first call, before training begins
            self.sources = sources(tracker._hardware)
            self.tracker = tracker
        except Exception as e:
            self.warn(f"CodeCarbon does not start, energy is not recorded: {e!r}")

    def receive(self, total, delta):
        """CodeCarbon calls this with its totals (in kWh) since the start, at each flush and at its stop."""
        self.latest = {"cpu_kwh": total.cpu_energy, "gpu_kwh": total.gpu_energy, "ram_kwh": total.ram_energy}

    def measure(self, call):
        """The totals of this process after call(), the tracker's flush or stop. Raises RuntimeError for none."""
        self.latest = None
        call() # CodeCarbon swallows its own exceptions: that nothing was received is how one sees them
        if self.latest is None:
            raise RuntimeError(f"{call.__name__}() gave no reading")
        return {"seconds": time.perf_counter() - self.started, **self.latest}

    def warn(self, message):
        if not self.warned:
            say(f"emissions: {message}")
        self.warned = True

    def resume(self, step):
        """Take up the rows, and discard those beyond `step`. Lines say what was discarded, and what cannot be read."""
        lines, undone = [], 0.0
        if os.path.exists(self.path):
            with open(self.path, newline="", encoding="utf-8", errors="replace") as f:
                lines = f.readlines()
        whole = [line for line in lines if line.endswith("\n") and "\0" not in line]
        for row in csv.DictReader(whole):
            try:
                totals = {q: float(row[f"{q}_total"]) for q in QUANTITIES}
                is_undone = int(row["step"]) > step and row.get("discarded") != "1"
                energy = float(row["energy_kwh_interval"])
            except (KeyError, TypeError, ValueError):
                continue
            if None in row: # more values than columns
                continue
            if is_undone:
                row["discarded"], undone = 1, undone + energy
            self.rows.append(row)
            self.step, self.totals = step, totals
        unreadable = len(lines) - 1 - len(self.rows) # the first line names the columns
        if unreadable > 0:
            say(f"emissions: {unreadable} lines of {self.path} cannot be read and are left out")
        if undone:
            say(f"emissions: {undone:.4g} kWh went into steps beyond {step}, which are made again; they stay counted")
        if not self.rows and step > 0:
            say(f"emissions: {self.path} has no row up to step {step}, the totals begin at 0 here")

    def read(self, step, **extra):
        """
        Add a row for the time since the last one, with `extra` columns (val_loss, lr, ...). Returns the totals of the
        run, {<name>_total: value}, or {} where there are none.
        """
        return self.record(step, extra, "flush")

    def note(self, step):
        """
        Write the file with a row for the time since the last one, if that is a minute or more. The next row replaces
        it: it is there for a kill -9, after which resume() finds the energy of what was lost.
        """
        if self.tracker is None or time.monotonic() - self.noted < NOTE_SECONDS:
            return
        kept = list(self.rows), dict(self.totals), self.seen, self.step
        self.record(step, {}, "flush")
        self.rows, self.totals, self.seen, self.step = kept

    def stop(self, step=None, **extra):
        """
        Add the last row, at the step last read unless given, and end the tracker; the second time nothing happens.
        Returns the totals as read() does.
        """
        totals = self.record(self.step if step is None else step, extra, "stop")
        if self.tracker is not None:
            self.tracker = None
            self.scratch.cleanup()
        return totals

    def record(self, step, extra, call):
        """Add a row after the tracker's flush or stop, whichever `call` names; one that fails is only warned about."""
        if self.tracker is not None:
            try:
                self.add(step, extra, self.measure(getattr(self.tracker, call)))
                self.save()
            except Exception as e:
                self.warn(f"no row for step {step}, training goes on: {e!r}")
        if not self.rows:
            return {}
        return {f"{q}_total": value for q, value in self.totals.items()}

    def add(self, step, extra, now):
        # differences of CodeCarbon's totals; max, as a driver that resets its counter must not take energy back
        interval = {q: max(now[q] - self.seen[q], 0.0) for q in now}
        interval["energy_kwh"] = sum(interval[f"{part}_kwh"] for part in PARTS)
        interval["emissions_g"] = interval["energy_kwh"] * self.factor
        self.step, self.seen = step, now
        timestamp = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"step": step, "timestamp": timestamp, "g_per_kwh": self.factor}
        row.update({f"{part}_source": self.sources[part] for part in PARTS})
        for q in QUANTITIES:
            self.totals[q] += interval[q]
            row.update({f"{q}_interval": interval[q], f"{q}_total": self.totals[q]})
        self.rows.append({**row, "discarded": 0, **extra})

    def save(self):
        # the whole file at once, as a row per evaluation is little: a crash leaves it whole, and a new extra column
        # finds its place
        columns = {}
        for row in self.rows:
            columns.update(dict.fromkeys(row))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with replacing(self.path) as (f,):
            f.write(text.getvalue().encode())
        self.noted = time.monotonic()

    def describe(self):
        """One line for people: energy, CO2eq, and how each was come by."""
        if not self.rows:
            return "no energy recorded"
        words = {("cpu", "modelled"): "CPU modelled from TDP", ("gpu", "none"): "no GPU"}
        parts = [words.get((part, source), f"{part.upper()} {source}") for part, source in self.sources.items()]
        return (f"{self.totals['energy_kwh']:.4g} kWh, {self.totals['emissions_g']:.3g} g CO2eq "
                f"({', '.join(parts)}; {self.factor:.4g} g/kWh, {self.origin})")


def sources(hardware):
    """{cpu, gpu, ram: 'measured', 'modelled' or 'none'} for the hardware that a tracker has found."""
    found = dict.fromkeys(PARTS, "none")
    for item in hardware:
        kind = type(item).__name__
        if kind == "CPU":
            found["cpu"] = "measured" if item._mode in COUNTERS else "modelled"
        elif kind == "RAM":
            found["ram"] = "modelled"
        else: # GPU (NVML, AMD SMI), or a part of an AppleSiliconChip or a Raspberry
            found[getattr(item, "chip_part", kind).lower()] = "measured"
    return found
