# make demo    prepares a corpus that needs no network, trains a small GPT with a cosine head, and shows what it learned
# make test    runs the linter and the tests
# make torture runs what takes longer: ten thousand fuzzed cases and kills at random moments, half an hour on 2 cores
# make study   trains every head on the digits and six in a small GPT, three seeds each, and tunes and judges four
#              heads by a small design of claims; report/index.html shows it
# make toys    trains small versions of the small studies, 20 seeds each, in about five minutes; figures in out/toys
# make gpu     measures what only an NVIDIA GPU can show, in 25 minutes, without a network: gpu-tests, gpu-bench, gpu-runs
# make clean   removes what these have made, except the corpus
# The first five make .venv beforehand; gpu takes it if it is there, else PYTHON as it is, and installs nothing.
# PYTHON=python3.12 chooses another Python, VENV=somewhere another place.
PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON = $(or $(wildcard $(VENV)/bin/python),$(PYTHON))
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

demo: $(VENV)/demo.installed
	$(VENV)/bin/python prepare_stdlib.py
	$(VENV)/bin/python train.py config/demo.py
	$(VENV)/bin/python sample.py --out_dir=out/demo --start='    def __init__(self, ' --num_samples=2 \
	    --max_new_tokens=120 --nearest='self,return,True,int,import,if,open,name'

# a study that has broken runs still has a report: the - goes on after it
study: $(VENV)/demo.installed
	$(VENV)/bin/python prepare_stdlib.py
	-$(VENV)/bin/python study.py config/study_digits.py
	-$(VENV)/bin/python study.py config/study_gpt.py
	-$(VENV)/bin/python claims.py --design=config/claims_small.toml --out_dir=out/claims_small
	$(VENV)/bin/python report.py out/claims_small out/study_digits out/study_gpt --out_dir=report

toys: $(VENV)/demo.installed
	$(VENV)/bin/python train_toy.py config/toy_modular.py --epochs=250 --heads=baseline,euclidean \
	    --out_dir=out/toys/modular
	$(VENV)/bin/python train_toy.py config/toy_points.py --epochs=2000 --out_dir=out/toys/points
	$(VENV)/bin/python train_toy.py config/toy_two_layer.py --epochs=200 --out_dir=out/toys/two_layer

test: $(VENV)/test.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/python -m pytest -q -n auto

torture: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest -q -n auto -m torture

$(VENV)/demo.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/test.installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r tests/requirements.txt
	touch $@ $(VENV)/demo.installed

# without a word gpu.py runs all three stages: one that fails does not keep the next from running
gpu:
	$(GPU_PYTHON) gpu.py

gpu-tests gpu-bench gpu-runs:
	$(GPU_PYTHON) gpu.py $(@:gpu-%=%)

clean:
	rm -rf .venv out/demo out/study_digits out/study_gpt out/claims_small out/toys report

.PHONY: demo test torture study toys gpu gpu-tests gpu-bench gpu-runs clean
