"""LLaMA-Factory in its own environment: training with the recorder of benchmarks.peers, or its data pipeline alone.

/path/to/its/venv/bin/python benchmarks/llamafactory_run.py run.yaml
/path/to/its/venv/bin/python benchmarks/llamafactory_run.py run.yaml tokenize
"""

import json
import sys
import time

import yaml


def train(config: dict) -> None:
    from llamafactory.train.tuner import run_exp

    from benchmarks.peers import recorder

    run_exp(args=config, callbacks=[recorder()])


def tokenize(config: dict) -> None:
    """From the file to token ids and labels; prints the rows and seconds as JSON."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, _, _ = get_train_args(config)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    started = time.perf_counter()
    found = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
    print(json.dumps({"rows": len(found["train_dataset"]), "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        settings = yaml.safe_load(file)
    (tokenize if sys.argv[2:] == ["tokenize"] else train)(settings)
