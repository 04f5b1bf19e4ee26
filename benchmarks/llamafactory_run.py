"""Runs LLaMA-Factory's training from a YAML file, in its own environment, with the recorder of benchmarks.peers.

/path/to/its/venv/bin/python benchmarks/llamafactory_run.py run.yaml
"""

import sys

import yaml
from llamafactory.train.tuner import run_exp

from benchmarks.peers import recorder

if __name__ == "__main__":
    with open(sys.argv[1]) as config:
        run_exp(args=yaml.safe_load(config), callbacks=[recorder()])
