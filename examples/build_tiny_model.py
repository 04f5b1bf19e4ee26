"""The embedded default: a byte-level BPE tokenizer trained on sample text, and a small random Llama. No download.

    python examples/build_tiny_model.py --output_dir outputs/tiny-model

The same input gives the same files. The model knows nothing yet: pretraining.py is its first lesson.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# The control tokens of the templates that a small model is likely to be trained with: vicuna, alpaca (</s>), chatml.
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(files: list[str], vocab_size: int):
    """A PreTrainedTokenizerFast: byte-level BPE, so that no text is unknown; `</s>` ends, `<pad>` pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        files,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, args: argparse.Namespace):
    """A Llama of args' shape with weights drawn from args.seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 8 // 3 // 16 * 16,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=args.hidden_size // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--text", nargs="+", default=[str(ROOT / "pretrain" / "train")], help="files or folders of .txt"
    )
    parser.add_argument("--output_dir", default="outputs/tiny-model")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    files = [str(file) for path in map(Path, args.text) for file in (sorted(path.rglob("*.txt")) or [path])]

    tokenizer = build_tokenizer(files, args.vocab_size)
    model = build_model(tokenizer, args)
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    return {"vocab_size": len(tokenizer), "parameters": model.num_parameters()}


if __name__ == "__main__":
    main()
