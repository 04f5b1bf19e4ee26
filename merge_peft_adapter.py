"""Merge a LoRA adapter into its base model, and prove it: the same prompts through both, compared.

    python merge_peft_adapter.py --base_model BASE --lora_model ADAPTER --output_dir MERGED

The result loads with a plain `from_pretrained`, carries tokenizer and chat template, and comes with merge_report.json.
"""

import argparse
import re

from stagewise.run.exit_codes import ScriptParser, boolean, run_script


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text, flags=re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 5GB or 500MB")
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--base_model", "--base_model_name_or_path", "--model_name_or_path", required=True)
    parser.add_argument("--lora_model", "--peft_model_path", required=True, help="folder of the adapter")
    parser.add_argument(
        "--tokenizer_path", help="tokenizer of the merged model; unset: the adapter's, else the base's"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the saved weights; auto: the base checkpoint's. The sum itself is always made in float32",
    )  # fmt: skip
    parser.add_argument(
        "--merge_onto", default="trained", choices=["trained", "original"],
        help="for an adapter trained on a quantized base: trained is the values that training saw, dequantized "
        "(exact); original the weights that were quantized (the report says what differs)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto",
        help="of the arithmetic, a block of layers at a time: cpu, cuda, cuda:1 ...; auto is the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--max_shard_size", type=_size,
        help="of a file of weights, such as 5GB or 500MB; unset: the weights stay in the files that the base has",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", type=boolean, nargs="?", const=True, default=False)
    parser.add_argument(
        "--allow_pickle", type=boolean, nargs="?", const=True, default=False,
        help="read weights that are not safetensors, by torch's restricted unpickler",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is in output_dir")
    parser.add_argument("--push_to_hub", help="hub name to upload the merged model to")
    parser.add_argument("--hf_hub_token")
    parser.add_argument("--model_type", help=argparse.SUPPRESS)  # the ancestor's scripts pass it; the config knows
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)

    from stagewise.run import merging, preflight

    merging.check_paths(args)
    preflight.check_merge(args)
    tokenizer = merging.load_merge_tokenizer(
        args.tokenizer_path, args.lora_model, args.base_model, args.trust_remote_code
    )
    found = merging.open_merge(
        args.base_model, args.lora_model, tokenizer, merging.named_device(args.device), args.trust_remote_code,
        args.merge_onto, args.allow_pickle, None if args.dtype == "auto" else merging.named_dtype(args.dtype),
    )  # fmt: skip
    report = merging.merge(found, tokenizer, args.output_dir, args.base_model, args.lora_model, args.max_shard_size)
    if "base_difference" in report:
        difference = report["base_difference"]
        print(
            "the adapter was trained on quantized weights and merged onto the original ones: against base + adapter "
            f"as trained, logits differ by up to {difference['max_logit_difference']:.1e}, top-1 agreement "
            f"{difference['top1_agreement']:.1%}"
        )
    if args.push_to_hub:
        merging.push(args.output_dir, args.push_to_hub, args.hf_hub_token)
    lost = f"update lost to rounding {report['update_lost']:.1%}"
    if report["proof"] == "weights":
        print(f"merged into {args.output_dir} ({report['dtype']}), proven on weights alone: {lost}")
        return report
    print(
        f"merged into {args.output_dir} ({report['dtype']}): max |logit difference| "
        f"{report['max_logit_difference']:.1e} of {report['adapter_effect']:.2f} that the adapter makes, "
        f"{report['saved']['max_logit_difference']:.1e} after saving; top-1 agreement "
        f"{report['saved']['top1_agreement']:.1%}; {lost}"
    )
    return report


if __name__ == "__main__":
    run_script(main)
