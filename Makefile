# `make demo` and `make test` work on a bare clone: they build .venv when it is not there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
RUN := .venv/bin/python
DEMO := outputs/demo
# A real FaceSynthetics folder instead of drawn faces: make demo DATA_ROOT=/path/to/dataset_100000
DATA_ROOT ?=
# CPU processes of the demo; ignored where there are GPUs.
PROCESSES ?= 2

.PHONY: demo test clean
.DELETE_ON_ERROR:

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/ready
	rm -rf $(DEMO)
ifeq ($(DATA_ROOT),)
	$(RUN) -m data.synthetic --out $(DEMO)/faces --count 1500 --size 192 --seed 0
endif
	$(RUN) -m data.build_shards --dataset facesynthetics --root "$(or $(DATA_ROOT),$(DEMO)/faces)" --out $(DEMO)/shards
	gpus=$$($(RUN) -c 'import torch; print(torch.cuda.device_count())'); devices=; n=$$gpus; \
	if [ $$gpus = 0 ]; then n=$(PROCESSES); devices=$$(seq -s, 0 $$((n - 1))); fi; micro=$$(((7 + n) / n)); \
	PATH="$(CURDIR)/.venv/bin:$$PATH" CONFIG=train/configs/demo.yaml OUTPUT_DIR=$(DEMO)/run DEVICES=$$devices \
	TRAIN_BATCH_SIZE_PER_GPU=$$micro GLOBAL_BATCH_SIZE=$$((micro * n)) launch/node.sh
	$(RUN) -m train.report $(DEMO)/run

test: .venv/ready
	$(RUN) -m pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf .venv outputs
