.PHONY: test pipeline lint format frozen-flags clean

test:            ## the whole suite
	bash run_tests.sh

pipeline:        ## the staged chain on the embedded default
	bash run_pipeline.sh

lint:            ## style and types
	ruff check . && ruff format --check . && mypy

format:          ## let ruff rewrite
	ruff check --fix . && ruff format .

frozen-flags:    ## accept the flags of today's scripts as the frozen lists
	python tests/frozen_flags/update.py

clean:
	rm -rf outputs .pytest_cache .ruff_cache .mypy_cache build *.egg-info
