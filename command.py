"""
The command of the installed package: `distance-heads train config/demo.py` is `python train.py config/demo.py` with the
scripts and configs that were installed, in whatever folder it is given.
"""
import os
import runpy
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = ("prepare_stdlib", "prepare_openwebtext", "train", "train_vision", "train_metric", "train_toy", "study",
           "report", "sample", "export_hf", "figures", "figures_metric", "figures_toy", "bench", "data", "distances")


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\ndistance-heads {'|'.join(SCRIPTS)} [its arguments, or --help]")
        return
    if name not in SCRIPTS:
        raise SystemExit(f"there is no script {name!r}: use {', '.join(SCRIPTS)}")
    path = os.path.join(HERE, f"{name}.py")
    sys.path.insert(0, HERE) # they import each other by their names, as python train.py does
    sys.argv = [path, *sys.argv[2:]]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__": # torchrun -m distance_heads.command train ...
    main()
