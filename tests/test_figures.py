"""
figures.py: every picture of a run is drawn from its folder alone, shows something, and is refused in a line where it
cannot be drawn.

$ pytest tests/test_figures.py
"""
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, flags, make_dataset, run_script, train
from test_report import write_run

import figures

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def assert_shows_something(path):
    import matplotlib.image
    with open(path, "rb") as f:
        assert f.read(8) == PNG
    picture = matplotlib.image.imread(path)[..., :3]
    assert min(picture.shape[:2]) > 150, path
    assert picture.std() > 0.01, path
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, path


def edit_config(folder, **changes):
    info = json.loads((folder / "config.json").read_text())
    info.update(changes)
    (folder / "config.json").write_text(json.dumps(info))
    return info

# -----------------------------------------------------------------------------
# a run's folder


@pytest.mark.parametrize("distance", ["baseline", "cosine", "minkowski:p=3"])
def test_every_picture_of_a_run_is_drawn_from_its_folder(tmp_path, distance):
    vision = write_run(tmp_path / "vision", distance=distance)
    text = write_run(tmp_path / "text", distance=distance, script="train.py", dataset="a $ text")
    assert figures.draw(str(vision)) == [str(vision / "curves.png"), str(vision / "learned.png")]
    assert figures.draw(str(text)) == [str(text / "loss.png")]
    for path in (vision / "curves.png", vision / "learned.png", text / "loss.png"):
        assert_shows_something(path)


def test_prototypes_on_pixels_are_images(tmp_path):
    run = write_run(tmp_path / "run", model="pixels") # 10 prototypes of 1 x 2 x 4 pixels
    (run / "probe.npz").unlink() # not needed for them
    figures.learned(str(run))
    assert_shows_something(run / "learned.png")
    fig = figures.images(np.arange(24.0).reshape(3, 2, 2, 2)[:, :1])
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert len(shown) == 3 and all(np.array_equal(image, [[0, 1 / 3], [2 / 3, 1]]) for image in shown)


def test_the_plane_is_that_of_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    h, prototypes, means = rng.normal(size=(50, 6)) * range(1, 7), rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    y = np.arange(50) % 3
    for directions in (False, True):
        for given in (means, None):
            ax = figures.plane(prototypes, h, y, given, directions).axes[0]
            drawn = [np.asarray(collection.get_offsets()) for collection in ax.collections]
            own = given if given is not None else np.stack([h[y == k].mean(0) for k in range(3)])
            arrays = h, own, prototypes
            if directions:
                arrays = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in arrays]
            pca = decomposition.PCA(2).fit(arrays[0])
            points, centres, stars = (np.abs(pca.transform(a)) for a in arrays) # the sign of a component is arbitrary
            for k in range(3): # of each class its points, then its mean and its prototype
                np.testing.assert_allclose(np.abs(drawn[3 * k]), points[y == k], atol=1e-9)
                np.testing.assert_allclose(np.abs(drawn[3 * k + 1]), centres[k:k + 1], atol=1e-9)
                np.testing.assert_allclose(np.abs(drawn[3 * k + 2]), stars[k:k + 1], atol=1e-9)
            assert f"{pca.explained_variance_ratio_[0]:.0%}" in ax.get_xlabel()
            assert f"{pca.explained_variance_ratio_[1]:.0%}" in ax.get_ylabel()


def test_class_means_come_from_the_run_where_it_wrote_them(tmp_path, monkeypatch):
    run, asked = write_run(tmp_path / "run"), []
    h, y, means = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) % 10, np.full((10, 8), 7.0)
    plane = figures.plane
    monkeypatch.setattr(figures, "plane", lambda *args, **kwargs: asked.append(kwargs) or plane(*args, **kwargs))
    np.savez(run / "probe.npz", h=h, y=y, class_means=means)
    figures.learned(str(run))
    np.savez(run / "probe.npz", h=h, y=y)
    figures.learned(str(run))
    assert np.array_equal(asked[0]["class_means"], means) and "class_means" not in asked[1]


def test_more_than_ten_classes(tmp_path):
    run = write_run(tmp_path / "run")
    info = edit_config(run)
    edit_config(run, data={**info["data"], "num_classes": 13})
    best = torch.load(run / "best.pt", weights_only=True)
    torch.save({**best, "model": {"head.weight": torch.randn(16, 8)}}, run / "best.pt") # three are padding
    figures.learned(str(run))
    assert_shows_something(run / "learned.png")


def test_the_head_in_words(tmp_path):
    run = write_run(tmp_path / "run", distance="minkowski", distance_params="p=3", learn_n=True, n=2.0)
    assert figures.head_in_words(figures.read_config(str(run))) == "minkowski (standard), harmonic, n=2 learned"
    run = write_run(tmp_path / "base")
    assert figures.head_in_words(figures.read_config(str(run))) == "baseline"
    edit_config(run, head="8 -> 10, as the script said, " + "and much more, " * 10)
    assert figures.head_in_words(figures.read_config(str(run))).startswith("8 -> 10, as the script said, and")
    title = figures.title(figures.read_config(str(run)), "mlp")
    assert title.startswith("digits, mlp, head 8 -> 10") and max(map(len, title.split("\n"))) <= 80


def test_a_run_in_progress(tmp_path):
    run = write_run(tmp_path / "run", ended=False)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(row for row in rows if '"eval"' in row)
    (run / "metrics.jsonl").write_text(rows[0] + first) # no epoch has ended
    figures.curves(str(run))
    assert_shows_something(run / "curves.png")


def test_a_real_run_is_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "data" / "tiny")
    train(out_dir="text", distance="cosine", learn_n=True, max_iters=10, eval_interval=5)
    run_script("train_vision.py", *flags(out_dir="digits", distance="canberra", epochs=1, track_emissions=False))
    for folder, names in (("text", ["loss.png"]), ("digits", ["curves.png", "learned.png"])):
        for name in names:
            if os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        paths = [os.path.join(folder, name) for name in names]
        assert figures.draw(folder) == paths
        for path in paths:
            assert_shows_something(path)

# -----------------------------------------------------------------------------
# what is refused


def break_run(folder, how):
    if how == "config":
        (folder / "config.json").write_text("{")
    elif how == "not a run":
        (folder / "config.json").write_text("[]")
    elif how == "another script":
        edit_config(folder, script="other.py")
    elif how == "metrics":
        (folder / "metrics.jsonl").write_text("")
    elif how == "probe":
        (folder / "probe.npz").write_bytes(b"PK")
    else:
        (folder / how).unlink()


@pytest.mark.parametrize("how, message", [
    ("config.json", "is not a run's folder: it has no config.json"), ("config", "config.json cannot be read"),
    ("not a run", "config.json cannot be read"), ("another script", "a run of 'other.py', not of train.py"),
    ("metrics", "no evaluation yet"), ("metrics.jsonl", "no evaluation yet"), ("probe", "probe.npz cannot be read"),
    ("probe.npz", "there is no .*probe.npz"), ("best.pt", "best.pt cannot be read as a checkpoint .File")])
def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path, capsys, how, message):
    break_run(write_run(tmp_path / "broken"), how)
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        figures.draw(str(tmp_path / "broken"))
    with pytest.raises(SystemExit, match=message) as e:
        figures.main([str(tmp_path / "broken"), str(run)])
    assert isinstance(e.value.code, str) and "\n" not in e.value.code
    assert str(run / "learned.png") in capsys.readouterr().out # the others are drawn all the same


def test_a_full_disk_is_said_in_a_line(tmp_path):
    run = write_run(tmp_path / "run", script="train.py")
    (run / "loss.png.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="run cannot be drawn .OSError: .*No space left on device"):
        figures.main([str(run)])


def test_a_name_is_no_mathematics(tmp_path):
    run = write_run(tmp_path / "run", script="train.py", dataset=r"$\frac$")
    figures.main([str(run)])
    assert_shows_something(run / "loss.png")


def test_as_a_script(tmp_path, capsys):
    run, none = write_run(tmp_path / "run", script="train.py"), str(tmp_path / "none")
    command = [sys.executable, os.path.join(ROOT, "figures.py"), str(run), none]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == str(run / "loss.png") + "\n"
    assert done.stderr == f"{none} is not a run's folder: it has no config.json\n" # no traceback
    figures.main([str(run)])
    assert capsys.readouterr().out == str(run / "loss.png") + "\n"
    figures.main(["--help"])
    assert capsys.readouterr().out.startswith("Every picture")
    with pytest.raises(SystemExit, match="no folder given"):
        figures.main([])


def test_importing_it_imports_no_script_and_no_matplotlib():
    scripts = {"train", "train_vision", "bench", "study", "report", "sample"}
    code = f"import sys, figures; print(sorted(({scripts} | {{'matplotlib', 'sklearn', 'scipy'}}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_matplotlib(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        figures.draw(str(run))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        figures.main([str(run)])

# -----------------------------------------------------------------------------
# tables


def test_growth(tmp_path):
    sizes = [(16, 32, 8), (32, 32, 8), (64, 32, 8), (16, 64, 8), (16, 128, 8), (16, 32, 16), (16, 32, 32)]
    rows = []
    for size, head in itertools.product(sizes, ("baseline", "cosine", "linear + CE")):
        rows.append(dict(head=head, ms=float(np.prod(size)), MiB=float(sum(size)), raw=dict(NVD=size)))
    path = tmp_path / "new" / "growth.png"
    assert figures.growth(rows, (16, 32, 8), str(path)) == str(path)
    assert_shows_something(path)


def test_styles_tell_the_variants_of_a_distance_and_the_links_apart():
    from distances import DISTANCES
    from results import Head
    looks = set()
    for distance, variants in DISTANCES.items():
        for variant, link in itertools.product(variants, ("harmonic", "softmin")):
            look = figures.style(Head(distance, variant, "", link, "fixed", 1.0, 1e-4, 1.0))
            looks.add((look["color"], look["ls"], look["marker"], look["mfc"]))
    assert len(looks) == 2 * sum(map(len, DISTANCES.values()))


def test_numbers_far_apart_get_a_logarithmic_axis():
    _, (near, far) = figures.new_figure(4, 2, 1, 2)
    figures.log_if_wide(near, [1, 8])
    figures.log_if_wide(far, [1, 9])
    assert (near.get_xscale(), far.get_xscale()) == ("linear", "log")
