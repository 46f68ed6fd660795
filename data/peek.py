"""What a token file says: `python data/peek.py data/shakespeare/train.bin` decodes some stretches of it."""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from configurator import UserError, run_command

FILES = ("train.bin", "val.bin")  # of a dataset: what its manifest speaks of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="data/peek.py", description="Decode some stretches of a token file.")
    parser.add_argument("file", type=Path, help="train.bin or val.bin of a prepared dataset; of a folder its val.bin")
    parser.add_argument("--samples", type=int, default=3, help="stretches, drawn at random [3]")
    parser.add_argument("--tokens", type=int, default=100, help="length of each [100]")
    parser.add_argument("--at", type=int, help="decode one stretch, from this token on")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    args = parser.parse_args(argv)
    if args.file.is_dir():
        args.file = args.file / "val.bin"
    if args.samples < 1 or args.tokens < 1:
        raise UserError("--samples and --tokens must be at least 1")
    show(args)
    return 0


def show(args: argparse.Namespace) -> None:
    from data.tokenizer import load_tokenizer
    from data.tokens import GPT2_VOCAB_SIZE, Dataset, how_to_prepare, open_tokens, read_meta

    folder = args.file.parent.resolve()
    if not args.file.is_file():
        if args.file.name in FILES and not (folder / "val.bin").is_file():
            raise UserError(how_to_prepare(folder))
        raise UserError(f"{args.file}: no such file; name train.bin or val.bin of a prepared dataset")
    data = Dataset.without_tokens(folder, read_meta(folder).get("vocab_size", GPT2_VOCAB_SIZE))
    tokens = open_tokens(args.file.resolve(), data.manifest, 1)
    tokenizer = load_tokenizer(data)
    if args.at is not None and not 0 <= args.at < len(tokens):
        raise UserError(f"--at={args.at}: {args.file} has tokens 0 to {len(tokens) - 1:,}")
    print(f"{args.file}: {len(tokens):,} tokens of {tokens.dtype}, tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    if data.manifest and args.file.name in FILES:
        split = data.manifest.val if args.file.stem == "val" else data.manifest.train
        print(f"{split.documents:,} documents, {split.bytes:,} bytes of text, from {data.manifest.source}")
    draw = random.Random(args.seed)
    last = max(0, len(tokens) - args.tokens)
    starts = [args.at] if args.at is not None else sorted(draw.randint(0, last) for _ in range(args.samples))
    for start in starts:
        ids = tokens[start : start + args.tokens].tolist()
        if (highest := max(ids)) >= tokenizer.vocab_size:
            raise UserError(
                f"{args.file}: id {highest:,} near token {start:,} is beyond the tokenizer's {tokenizer.vocab_size:,}"
            )
        print(f"--- from token {start:,}\n{tokenizer.decode(ids)}")


if __name__ == "__main__":
    run_command(main)
