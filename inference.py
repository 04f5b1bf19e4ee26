"""Chat with, or batch-generate from, any stage's output: an adapter or a full (merged) model; or score with it.

    python inference.py --model_name_or_path outputs/sft-merged                                  # chat
    python inference.py --model_name_or_path outputs/sft-merged --prompt "Who are you?"
    python inference.py --model_name_or_path BASE --lora_model outputs/sft --input_file in.jsonl --output_file out
    python inference.py --model_name_or_path outputs/rm --score --input_file in.jsonl --output_file out.jsonl

The template comes from stage.json (or --template_name, or the tokenizer's own).
"""

import argparse
import json
import os
from pathlib import Path

from stagewise.errors import InputError
from stagewise.run.exit_codes import ScriptParser, boolean, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model_name_or_path", "--base_model", required=True, help="full model, or adapter folder")
    parser.add_argument("--lora_model", help="adapter to put on the model")
    parser.add_argument("--tokenizer_path", help="unset: the adapter's, or the model's")
    parser.add_argument("--template_name", help="unset: from stage.json, or else the tokenizer's own")
    parser.add_argument("--tool_format", choices=["default", "qwen", "llama3", "glm4", "mistral"])
    parser.add_argument("--system_prompt", help="system turn of every conversation that has none")
    parser.add_argument("--prompt", help="answer this one question and stop")
    parser.add_argument("--input_file", help="rows of any conversation format, or {question}; answers all")
    parser.add_argument("--output_file", help=".jsonl: each row of the input with its `response` (or `score`)")
    parser.add_argument("--score", action="store_true", help="a reward model: score the rows of --input_file")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.9, help="used when temperature is above 0")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--rope_scaling", choices=["linear", "dynamic", "yarn", "llama3"],
        help="unset: as trained, from stage.json or config.json; another one is refused",
    )  # fmt: skip
    parser.add_argument("--model_max_length", type=int, help="tokens that --rope_scaling is to reach")
    parser.add_argument(
        "--force_rope_scaling", action="store_true",
        help="use another RoPE scaling than that of training: --rope_scaling's, or without it the base model's own",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", type=boolean, nargs="?", const=True, default=False)
    parser.add_argument(
        "--allow_pickle", type=boolean, nargs="?", const=True, default=False,
        help="read weights that are not safetensors, by torch's restricted unpickler",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.input_file) != bool(args.output_file):
        parser.error("--input_file and --output_file go together")
    if args.prompt is not None and args.input_file:
        parser.error("--prompt and --input_file: give one")
    if args.score and not args.input_file:
        parser.error("--score: needs --input_file, conversations that end with an answer, and --output_file")
    if args.batch_size < 1:
        parser.error(f"--batch_size: found {args.batch_size}, expected 1 or more")
    if bool(args.rope_scaling) != bool(args.model_max_length):
        parser.error("--rope_scaling and --model_max_length go together")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot end well, before anything is loaded."""
    from stagewise.data.loading import named_template
    from stagewise.run.preflight import check_inference

    check_inference(args)
    if args.template_name:
        named_template(args.template_name, args.tool_format)


def load(args: argparse.Namespace):
    """(model, tokenizer, renderer) of what --model_name_or_path and --lora_model name."""
    from stagewise.data.tokenization import build_renderer
    from stagewise.modeling.generation import load_for_inference
    from stagewise.modeling.rope_scaling import RopeRequest
    from stagewise.run.lineage import read_stage
    from stagewise.run.merging import choose_device
    from template import get_template

    model, tokenizer = load_for_inference(
        args.model_name_or_path, args.lora_model, args.tokenizer_path, args.dtype, choose_device(args.device),
        args.trust_remote_code, args.score,
        RopeRequest(args.rope_scaling, args.model_max_length, args.force_rope_scaling), args.allow_pickle,
    )  # fmt: skip
    stage = read_stage(args.lora_model) or read_stage(args.model_name_or_path) or {}
    name = args.template_name or stage.get("template")
    template = get_template(name, tool_format=args.tool_format) if name else None
    return model, tokenizer, build_renderer(template, tokenizer)


class Chat:
    """A model with its tokenizer and template; keeps nothing between calls."""

    def __init__(self, args: argparse.Namespace):
        from transformers import set_seed

        from stagewise.modeling import generation

        set_seed(args.seed)
        self.generation = generation
        self.sampling = generation.Sampling(args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty)
        self.model, self.tokenizer, self.renderer = load(args)
        self.stop_ids = generation.stop_token_ids(
            self.tokenizer, self.renderer.stop_tokens, self.model.generation_config
        )
        self.system_prompt, self.batch_size = args.system_prompt, args.batch_size

    def answer(self, conversations: list[list[dict]], tools: list | None = None, stream: bool = False) -> list[str]:
        """One answer for each list of messages that waits for one."""
        tools = tools or [None] * len(conversations)
        prompts = [
            self.renderer.render(self._with_system(messages), tools=t, add_generation_prompt=True).text
            for messages, t in zip(conversations, tools, strict=True)
        ]
        return self.generation.generate(
            self.model, self.tokenizer, prompts, self.stop_ids, self.sampling, self.batch_size, stream
        )

    def _with_system(self, messages: list[dict]) -> list[dict]:
        return with_system(messages, self.system_prompt)


def with_system(messages: list[dict], system_prompt: str | None) -> list[dict]:
    """The messages, behind the system prompt if they have none of their own."""
    if system_prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def answer_file(chat: Chat, input_file: str, output_file: str) -> int:
    """Answer every row of a file; the output appears whole or not at all. Returns the number of rows."""
    from stagewise.data.records import Prompt

    rows, prompts = read_records(input_file, Prompt)
    answers = chat.answer([prompt.messages for prompt in prompts], [prompt.tools for prompt in prompts])
    write_rows(output_file, [{**row, "response": answer} for row, answer in zip(rows, answers, strict=True)])
    return len(rows)


def score_file(args: argparse.Namespace) -> int:
    """Score every conversation of a file; the output appears whole or not at all. Returns the number of rows."""
    from stagewise.data.records import Conversation
    from stagewise.modeling.generation import score

    rows, chats = read_records(args.input_file, Conversation)
    model, tokenizer, renderer = load(args)
    texts = [renderer.render(with_system(chat.messages, args.system_prompt), tools=chat.tools).text for chat in chats]
    scores = score(model, tokenizer, texts, args.batch_size)
    write_rows(args.output_file, [{**row, "score": value} for row, value in zip(rows, scores, strict=True)])
    return len(rows)


def read_records(input_file: str, record_type) -> tuple[list[dict], list]:
    """(rows, records) of a file. Raises InputError with the location of the first row that cannot be used."""
    from stagewise.data.files import BadRow, read_rows

    rows, records = [], []
    for location, row in read_rows(Path(input_file)):
        if isinstance(row, BadRow):
            raise InputError(f"{location}: {row.reason}")
        try:
            records.append(record_type.from_row(row))
        except InputError as error:
            raise InputError(f"{location}: {error}") from error
        rows.append(row)
    return rows, records


def write_rows(output_file: str, rows: list[dict]) -> None:
    """Write a .jsonl file beside its place, then move it there."""
    temporary = Path(f"{output_file}.partial")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, output_file)


def chat_loop(chat: Chat) -> None:
    """Questions from the terminal, answers streamed, the history kept. `clear` forgets it, `exit` ends."""
    print("Type a question; `clear` forgets the conversation, `exit` ends.")
    history: list[dict] = []
    while True:
        try:
            question = input("user> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("exit", "quit"):
            return
        if question == "clear":
            history = []
            continue
        if not question:
            continue
        history.append({"role": "user", "content": question})
        print("assistant> ", end="", flush=True)
        try:
            (answer,) = chat.answer([history], stream=True)
        except InputError as error:
            print(f"{error}; the conversation is forgotten")
            history = []
            continue
        history.append({"role": "assistant", "content": answer or " "})


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    check(args)
    if args.score:
        count = score_file(args)
        print(f"{count} scores in {args.output_file}")
        return {"scored": count}
    chat = Chat(args)
    if args.input_file:
        count = answer_file(chat, args.input_file, args.output_file)
        print(f"{count} answers in {args.output_file}")
        return {"answered": count}
    if args.prompt is not None:
        (answer,) = chat.answer([[{"role": "user", "content": args.prompt}]])
        print(answer)
        return {"answer": answer}
    chat_loop(chat)
    return {}


if __name__ == "__main__":
    run_script(main)
