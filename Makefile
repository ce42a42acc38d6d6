# `make demo` and `make test` need only Python 3.11+, make and internet access.
# The demo runs without torch. Everything else here takes the full set, with the plain torch package, which brings CUDA's
# libraries; TORCH=cpu takes torch's CPU build, a tenth of the download, where its channel can be reached.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= default
TORCH_VERSION := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
INSTALL := $(UV) --no-deps --build-constraints requirements/build.txt --editable .
DEMO_INSTALLED := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed-$(TORCH)
LOCK ?= dev
JOBS ?= 3
IMAGE ?= sentiment-worker
TARGET ?= cpu
SUITE ?= engine tokenizers worker load loop end_to_end

# Where it is set, each of the many processes that tests start would compile torch and transformers anew: five CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo unit test reach chaos fuzz bench compare check audit format lock dist image image-test sbom helm cluster-test dashboard docs clean

demo: $(DEMO_INSTALLED)
	$(BIN)/sentiment-worker demo $(DEMO)

# Without a broker: what one module does.
unit: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(or $(TESTS),tests/unit)

# Most tests wait for a broker more than they compute; each of JOBS processes has a broker of its own.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

# With a database, Kafka Connect, a schema registry and an OAuth provider. Each comes from Maven Central or is installed; a
# test is skipped, and says why, where what it needs is missing.
reach: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(or $(TESTS),tests/reach)

# Disturbs workers, broker and network, and accounts for every event; then the single cases in their long form: an hour.
# For example: make chaos CHAOS="--delivery exactly-once --events 1000000 --acts 100 --rate 900".
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos $(CHAOS)
	CHAOS_LONG=1 $(BIN)/python -m pytest tests/chaos tests/integration/test_nearest_replica.py

# 10,000 hostile payloads where `make test` takes 1,500, then ten minutes of coverage-guided fuzzing of the decoder. What that
# finds stays in .fuzz. Where there is no package of atheris for the machine, it says so.
fuzz: $(INSTALLED)
	HOSTILE_PAYLOADS=10000 $(BIN)/python -m pytest tests/unit/test_hostile_payloads.py tests/integration/test_hostile_input.py
	$(UV) --require-hashes -r requirements/fuzz.txt
	mkdir -p .fuzz
	$(BIN)/python -m tests.fuzz.decoder .fuzz/corpus -dict=tests/fuzz/json.dict -artifact_prefix=.fuzz/ \
	  -max_total_time=600 -max_len=20000 -timeout=10 -use_value_profile=1 -print_final_stats=1 $(FUZZ)

# Most figures, on an idle machine, about two hours: make bench TEXTS=texts.csv. Fewer: SUITE="engine load"; BENCH goes to
# the comparison with the peers, which need older versions of some packages and so an environment of their own. Not in SUITE:
# python -m benchmarks.delivery, .scale, .start, .onnx_engine, .console, .analyst_queries, .install, .container, .long_texts and
# .gpu, and make chaos CHAOS="--report FILE".
bench: $(INSTALLED)
	for part in $(filter-out end_to_end,$(SUITE)); do $(BIN)/python -m benchmarks.$$part $(TEXTS) || exit; done
ifneq ($(filter end_to_end,$(SUITE)),)
	$(MAKE) VENV=$(VENV)-bench LOCK=bench compare
endif
	$(BIN)/python -m benchmarks.chart

compare: $(INSTALLED)
	$(BIN)/python -m benchmarks.end_to_end $(TEXTS) $(BENCH)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of every locked package, by the advisories of PyPI; one that cannot be looked up is a failure too.
audit: $(BIN)/uv
	$(UV) --require-hashes -r requirements/audit.txt
	for lock in requirements/*.txt; do \
	  $(BIN)/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r $$lock || exit 1; done

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" requirements/lock --upgrade

# The sdist, and the wheel made from it.
dist: $(BIN)/uv
	$(BIN)/uv build --quiet --python $(BIN)/python --require-hashes --build-constraints requirements/build.txt --out-dir dist

# TARGET=cuda for NVIDIA's GPUs; DOCKER_BUILD holds options more, such as --build-arg BASE=registry.example/python:3.11.
image:
	docker build $(DOCKER_BUILD) --target $(TARGET) --tag $(IMAGE):$(TARGET) \
	  --build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	  --build-arg REVISION=$(shell git rev-parse HEAD) .

image-test: image $(INSTALLED)
	TEST_IMAGE=$(IMAGE):$(TARGET) $(BIN)/python -m pytest tests/container

# What the image was made of, in CycloneDX's form; the build wrote it.
sbom: image
	mkdir -p dist
	docker run --rm --entrypoint cat $(IMAGE):$(TARGET) /opt/worker/sbom.cdx.json >dist/sentiment-worker-$(TARGET).cdx.json

# helm alone, for the tests of the chart, where Go is and helm is not: four CPU minutes and 2 GB in Go's caches the first time.
CLUSTER ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sentiment-worker/cluster
BUILT := $(abspath $(CLUSTER))/bin
BUILD := CGO_ENABLED=0 go build -o $(BUILT)/ -ldflags "-s -w \
  -X k8s.io/component-base/version.gitVersion=$(shell sed -n 's|^require k8s.io/kubernetes ||p' tests/cluster/go.mod)"
helm: $(BUILT)/helm
$(BUILT)/helm:
	cd tests/cluster && $(BUILD) helm.sh/helm/v4/cmd/helm

# The chart on a real Kubernetes API without a container runtime. Needs Go and Python, not the worker; CLUSTER keeps what is
# built from Go's modules: 4 GiB of memory and minutes the first time, seconds after that.
cluster-test: $(BUILT)/.complete
	$(PYTHON) -m tests.cluster $(BUILT)
$(BUILT)/.complete: tests/cluster/go.sum
	cd tests/cluster && $(BUILD) tool
	touch $@

# What is generated in deploy/: dashboards, the alerts' links, the chart's values and settings, and its copy of the rules.
# RUNBOOK is where docs/operating.md is read by those who get the alerts: an address of yours, for the project has none. Where
# pyproject.toml names one, as Runbook in [project.urls], the console's banner links to it, too.
RUNBOOK ?= $(or $(shell sed -n 's/^Runbook = "\(.*\)"/\1/p' pyproject.toml),https://git.example/sentiment-worker/blob/main/docs/operating.md)
dashboard: $(INSTALLED)
	$(BIN)/python -m deploy.grafana.dashboard
	$(BIN)/python -m deploy.grafana.analysts
	sed -i.old 's|runbook_url: [^#]*#|runbook_url: $(RUNBOOK)#|' deploy/prometheus/rules.yaml && rm deploy/prometheus/rules.yaml.old
	cp deploy/prometheus/rules.yaml deploy/helm/sentiment-worker/files/rules.yaml
	$(BIN)/python deploy/helm/values.py

# The pages that are generated: docs/settings.md, docs/metrics.md and docs/schemas.
docs: $(INSTALLED)
	$(BIN)/python docs/reference.py

clean:
	rm -rf $(VENV) $(VENV)-bench build dist *.egg-info .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/uv: requirements/uv.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	touch $@

# A set adds to what is there and takes nothing away, so both fit into one environment; all locks agree on versions.
$(DEMO_INSTALLED): $(BIN)/uv pyproject.toml requirements/demo.txt requirements/build.txt
	@echo "Installing what the demo needs into $(VENV): at first some 90 MB to download, 290 MB on disk ..."
	$(UV) --require-hashes -r requirements/demo.txt
	$(INSTALL)
	touch $@

# The full set has what the demo needs.
$(INSTALLED): $(BIN)/uv pyproject.toml requirements/$(LOCK).txt requirements/torch.txt requirements/build.txt
	@echo "Installing into $(VENV): at first some 3 GB to download, 6 GB on disk; a tenth of it with TORCH=cpu ..."
	$(UV) --require-hashes -r requirements/$(LOCK).txt
ifeq ($(TORCH),cpu)
	$(UV) --torch-backend=cpu --constraint requirements/torch.txt torch==$(TORCH_VERSION) || \
	  { echo "torch's CPU channel cannot be reached; taking the plain package"; \
	    $(UV) --require-hashes -r requirements/torch.txt; }
else
	$(UV) --require-hashes -r requirements/torch.txt
endif
	$(INSTALL)
	rm -f $(VENV)/.installed-* && touch $@ $(DEMO_INSTALLED)
