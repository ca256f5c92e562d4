# Everything lives in .venv, which `make clean` removes: the Python that you
# already have, its packages and your settings are left as they are.
#
#   make recall ARGS=--help              flags for the run
#   make test ARGS=tests/test_house.py   one file, or any pytest flag
#   make test WORKERS=0                  in one process, for a debugger
#   make venv PYTHON=python3.13          which Python makes .venv

VENV = .venv
LOWEST = .venv-lowest
ARGS =
WORKERS = auto

# Python, and its pip, as if the user's shell had set nothing.
RUN = PYTHONPATH= PYTHONHOME= PYTHONSAFEPATH= $(VENV)/bin/python
PIP = PIP_USER=0 PIP_TARGET= PIP_PREFIX= \
  PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --quiet
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile

# The TPU compiler stays off the import path: where jax sees libtpu but no TPU
# it prints four lines of errors at every start.
AOT = test ! -e $(VENV)/installed-tpu-aot || export \
  TPU_LIBRARY_PATH="$$PWD/$(VENV)/tpu-aot/libtpu/libtpu.so" \
  ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost \
  TPU_ACCELERATOR_TYPE=v5litepod-4 \
  TPU_LOG_DIR=disabled TPU_MIN_LOG_LEVEL=3

.PHONY: help venv recall test nightly lowest lowest-tests gpu-aot lint clean

help:
	@echo "make recall   set up .venv, then run the main job on this CPU"
	@echo "make test     set up .venv, then run the tests"
	@echo "make venv     only set up .venv"
	@echo "make lint     ruff and mypy"
	@echo "make nightly  the tests that are too slow for every change"
	@echo "make lowest   some tests on the oldest versions that setup.cfg allows"
	@echo "make gpu-aot  the GPU compiler for the tests, which needs no GPU"
	@echo "make clean    remove .venv, .venv-lowest, every cache; runs/ is kept"
	@echo "Add ARGS='...' for the run or the tests, PYTHON=... for the Python."

venv: $(VENV)/installed
	@echo "$(VENV) is ready: $$($(RUN) -V), ssmjax and its experiments"

recall: $(VENV)/installed
	$(RUN) -m experiments.recall $(ARGS)

test: $(VENV)/installed-test $(VENV)/installed-tpu-aot
	@$(AOT); $(PYTEST) $(ARGS)

nightly: $(VENV)/installed-test $(VENV)/installed-tpu-aot
	@$(AOT); $(PYTEST) -m nightly $(ARGS)

# Ops, models, one `fit`, files, and every kernel lowered for its chip.
SLICE = $(addprefix tests/test_, \
  jax_versions.py types.py mamba.py generate.py tokenizers.py config_json.py \
  training_step.py::test_step_descends_in_complex_parameters \
  resume.py::test_killed_run_ends_as_the_unbroken_one \
  text_data.py::test_fit_stopped_in_an_epoch_goes_on_with_the_batches_to_come \
  interop_files.py linear_scan.py \
  selective_chunked.py::test_exponential_is_exact_in_a_compiled_program \
  dispatch.py::test_one_export_for_all_platforms_has_their_kernels_and_runs_here \
  $(addsuffix _are_lowered_alone_sharded_mapped_and_exported, \
    linear_scan_gpu.py::test_kernels linear_scan_tpu.py::test_kernels) \
  selective_scan_gpu.py::test_lowering_for_cuda_names_both_kernels \
  selective_scan_tpu.py::test_pallas_lowers_for_tpus_under_every_transformation \
  selective_step_tpu.py::test_every_platform_of_an_export_has_its_own_form)

# Every `>=` of setup.cfg read as `==`, which binds pip.
lowest:
	@mkdir -p build
	@sed -n 's/^ *\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg \
	  > build/lowest.txt
	@PIP_CONSTRAINT="$$PWD/build/lowest.txt" \
	  $(MAKE) --no-print-directory VENV=$(LOWEST) $(LOWEST)/installed-test
	@$(MAKE) --no-print-directory VENV=$(LOWEST) lowest-tests

lowest-tests:
	$(PYTEST) $(or $(ARGS),$(SLICE))

gpu-aot: $(VENV)/installed-gpu-aot
	@echo "$(VENV)/gpu-aot is ready: the tests compile for GPUs"

lint: $(VENV)/installed-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .*_cache .hypothesis

# A stamp is written last, so an interrupted installation is not taken for a
# finished one. A .venv whose Python is gone, or that never got its pip, is
# made anew.
FITS = import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))

$(VENV)/installed: setup.cfg pyproject.toml $(VENV)/bin/python
	@$(RUN) -c "import pip; $(FITS)" 2>/dev/null || { \
	  set -- "$(PYTHON)"; \
	  test -n "$$1" || set -- python3.12 python3.13 python3.14 python3 python; \
	  for python; do \
	    if PYTHONPATH= PYTHONHOME= "$$python" -c "$(FITS)" 2>/dev/null; then \
	      echo "Making $(VENV) with $$python"; \
	      PYTHONPATH= PYTHONHOME= "$$python" -m venv --clear $(VENV); \
	      exit; \
	    fi; \
	    found=$$("$$python" -V 2>&1 | head -n 1); \
	    echo "$$python: $${found##*: }"; \
	  done >&2; \
	  echo "None of these is a Python >= 3.12 with venv and ensurepip." \
	    "Any of these gets one:"; \
	  echo "  pyenv install 3.12"; \
	  echo "  uv python install 3.12"; \
	  echo "  apt install python3.12 python3.12-venv"; \
	  echo "  https://www.python.org/downloads"; \
	  echo "If it is not on PATH: make venv PYTHON=/where/it/is/python3.12"; \
	  exit 1; } >&2
	@echo "Installing ssmjax and its experiments (about 800 MB at first)"
	@$(PIP) --editable ".[experiments]"
	@touch $@

$(VENV)/bin/python: ;

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing the tests' tools"
	@$(PIP) --editable ".[experiments,test]"
	@touch $@

# Only Linux on x86_64 has a wheel. Without it the tests that compile for TPUs
# are skipped; the next `make test` asks for it again.
$(VENV)/installed-tpu-aot: $(VENV)/installed-test
	@if test "$$(uname -sm)" != "Linux x86_64"; then \
	  echo "No TPU compiler for $$(uname -sm): its tests are skipped"; \
	else \
	  pin=$$(grep -o "libtpu==[0-9.]*" setup.cfg); \
	  if grep -qsx "$$pin" $@; then touch $@; \
	  elif echo "Installing the TPU compiler (484 MB)" && \
	    rm -rf $(VENV)/tpu-aot && \
	    $(PIP) --no-deps --target $(VENV)/tpu-aot "$$pin"; \
	  then echo "$$pin" > $@; \
	  else echo "The TPU compiler can't be had: its tests are skipped"; \
	  fi; \
	fi

# Asked for by name only, for its size. It too stays off the import path, where
# jax would look for a GPU and cuDNN and print an error at every start: only
# the tests' compiler processes see it. What its parts depend on is not needed.
$(VENV)/installed-gpu-aot: $(VENV)/installed-test
	@pins=$$(awk '/^[a-z]/ {on = /^gpu-aot/} on && /==/ {print $$1}' setup.cfg); \
	if test "$$(cat $@ 2>/dev/null)" = "$$pins"; then touch $@; else \
	  echo "Installing the GPU compiler (548 MB)" && \
	  rm -rf $(VENV)/gpu-aot && \
	  $(PIP) --no-deps --target $(VENV)/gpu-aot $$pins && \
	  echo "$$pins" > $@; \
	fi
