"""Text to token ids and back, the same way when a dataset is prepared and when its model speaks.

A prepared dataset keeps its tokenizer beside its tokens: `tokenizer.json` (the `tokenizers` library), `tokenizer.model`
(SentencePiece) or the character table in meta.pkl. Only GPT-2's is named and left to tiktoken.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configurator import UserError
from data.source import go_offline_without_network
from data.tokens import GPT2_VOCAB_SIZE, Dataset, padded_vocab_size, read_meta

FILES = ("manifest.json", "meta.pkl", "tokenizer.json", "tokenizer.model")  # of a dataset: what load_tokenizer reads
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # what makers of tokenizers call it
LOADING_S = 60.0  # a tokenizer is a few megabytes: whoever needs longer has no network

# Code is mostly names and indentation, so a line break takes the indentation behind it along, and a name the dot, bracket
# or space before it. Every alternative that crosses a line break starts with a line break or with punctuation: text may be
# cut before a line break that follows a letter or a digit, and the tokens stay the same (data/source.py relies on that).
CODE_PATTERN = r"[\r\n]+ *|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]* *|\s+(?!\S)|\s+"

PROBE = "The year 1984, and don't  you   forget:\n\tif x_1 != 0: return f(x)  # naïve — 你好 🙂\n\n  (a/b) 3.14159 ... WHY?!\n"

T = TypeVar("T")


class Tokenizer(ABC):
    """What all tokenizers can do; text is never taken for a special token."""

    name: str  # what --tokenizer takes
    vocab_size: int  # ids are below it
    eot_id: int | None  # end of text; None: the tokenizer has none
    hash: str  # SHA-256: equal for tokenizers that give equal ids
    prefix_tokens: int = 0  # ids that encode() puts before every text; they do not belong in the middle of a document
    probe: str = PROBE  # a text that tells it from other tokenizers

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text. Lets other threads run meanwhile."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def to_json(self) -> str:
        """The same as a tokenizer.json of the `tokenizers` library. Raises UserError where it cannot be one."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """With the special tokens, such as LLaMA's <s>, that the tokenizer's maker puts around a text."""
        return self.encode(text)

    def save(self, folder: Path) -> None:
        """Writes meta.pkl, and what load_tokenizer needs, into a dataset's folder."""
        _write_meta(folder, {"vocab_size": self.vocab_size})


class CharacterTokenizer(Tokenizer):
    """One id a character, as in nanoGPT's character sets."""

    name = "characters"
    eot_id = None

    def __init__(self, itos: dict[int, str]) -> None:
        self.itos = itos
        self.vocab_size = len(itos)
        self.probe = "".join(itos[i] for i in range(len(itos)))
        self.hash = _sha256(self.probe.encode("utf-8", "surrogatepass"))
        self._id_of_code = np.full(max(map(ord, itos.values())) + 2, self.vocab_size, np.uint32)  # vocab_size: not known
        self._id_of_code[[ord(character) for character in itos.values()]] = list(itos)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> CharacterTokenizer:
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls(dict(enumerate(sorted(alphabet))))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        if len(unknown := np.flatnonzero(ids == self.vocab_size)):
            raise UserError(f"this dataset's {self.vocab_size} characters do not include {text[unknown[0]]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def to_json(self) -> str:
        from tokenizers import Tokenizer, decoders, models

        if surrogates := [character for character in self.itos.values() if "\ud800" <= character <= "\udfff"]:
            raise UserError(f"the characters include {surrogates[0]!r}, half of a pair, which no tokenizer.json can hold")
        backend = Tokenizer(models.BPE({character: i for i, character in self.itos.items()}, merges=[]))
        backend.decoder = decoders.Fuse()
        return backend.to_str()

    def save(self, folder: Path) -> None:
        stoi = {character: i for i, character in self.itos.items()}
        _write_meta(folder, {"vocab_size": self.vocab_size, "itos": self.itos, "stoi": stoi})


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken, which downloads the vocabulary once."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    eot_id = GPT2_VOCAB_SIZE - 1

    def __init__(self) -> None:
        import tiktoken

        self._encoding = _load(
            lambda: tiktoken.get_encoding("gpt2"),
            "GPT-2's vocabulary, which tiktoken downloads once: connect to a network, or set TIKTOKEN_CACHE_DIR to a folder "
            "that has it",
        )
        self._words = [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]
        self.hash = _sha256(b"".join(len(word).to_bytes(4, "little") + word for word in self._words))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def to_json(self) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = _letters_of_bytes()

        def spelled(word: bytes) -> str:
            return "".join(letters[byte] for byte in word)

        words = self._words[: self.eot_id]
        merges = [(spelled(left), spelled(right)) for left, right in merges_of(words)]
        backend = Tokenizer(models.BPE({spelled(word): i for i, word in enumerate(words)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT[0]])
        return backend.to_str()


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, by the `tokenizers` library."""

    def __init__(self, name: str, definition: str, eot_id: int | None) -> None:
        import tokenizers

        try:
            self._backend = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{name} is no tokenizer.json ({error})") from error
        self._backend.encode_special_tokens = True  # "</s>" in a text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name, self.definition = name, definition
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        known = (self._backend.token_to_id(token) for token in END_OF_TEXT)
        self.eot_id = eot_id if eot_id is not None else next((i for i in known if i is not None), None)
        self.hash = _sha256(definition.encode())
        self.prefix_tokens = _count_prefix(self)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        return self.definition

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "tokenizer.json").write_text(self.definition, encoding="utf-8", newline="")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer.model, such as LLaMA-2's."""

    def __init__(self, name: str, model: bytes) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is no SentencePiece model ({error})") from error
        self.name, self.model = name, model
        self.vocab_size = self._processor.vocab_size()
        self.eot_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        self.hash = _sha256(model)
        self.prefix_tokens = _count_prefix(self)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self._processor.encode(text), np.uint32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def to_json(self) -> str:
        """LLaMA's kind: byte-pair encoding of text whose spaces are ▁, one more in front, and bytes for what it does not know."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        processor = self._processor
        pieces = {processor.id_to_piece(i): i for i in range(self.vocab_size)}
        # A piece is merged from any two that it can be cut into, the likelier pieces first.
        cuts = [
            (-processor.get_score(i), i, piece[:cut], piece[cut:])
            for piece, i in pieces.items()
            if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
            for cut in range(1, len(piece))
            if piece[:cut] in pieces and piece[cut:] in pieces
        ]
        merges = [(left, right) for *_, left, right in sorted(cuts, key=lambda cut: cut[:2])]
        unknown = processor.id_to_piece(processor.unk_id())
        backend = Tokenizer(models.BPE(pieces, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
        backend.add_special_tokens([piece for piece, i in pieces.items() if processor.is_control(i)])
        definition = backend.to_str()
        if not same_ids(self, JsonTokenizer(self.name, definition, self.eot_id)):
            raise UserError(f"tokenizer {self.name} is not of LLaMA's kind: it cannot be written as a tokenizer.json")
        return definition

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "tokenizer.model").write_bytes(self.model)


def load_tokenizer(dataset: Dataset) -> Tokenizer:
    """The tokenizer that `dataset` was prepared with. Raises UserError when it is missing, changed or unknown."""
    folder, name = dataset.folder, dataset.tokenizer or dataset.name
    meta = read_meta(folder)
    tokenizer: Tokenizer
    if (folder / "tokenizer.json").exists():
        tokenizer = JsonTokenizer(name, _read(folder / "tokenizer.json").decode(), dataset.eot_id)
    elif (folder / "tokenizer.model").exists():
        tokenizer = SentencePieceTokenizer(name, _read(folder / "tokenizer.model"))
    elif "itos" in meta:
        tokenizer = CharacterTokenizer(meta["itos"])
    elif dataset.vocab_size in (GPT2_VOCAB_SIZE, padded_vocab_size(GPT2_VOCAB_SIZE)):
        tokenizer = Gpt2Tokenizer()
    else:
        raise UserError(f"{folder} does not say which tokenizer made it: put its tokenizer.json or tokenizer.model there")
    if dataset.tokenizer_hash not in (None, tokenizer.hash):
        raise UserError(f"the tokenizer in {folder} is not the one its tokens were made with; run prepare.py again")
    return tokenizer


def copy_tokenizer(dataset: Dataset, folder: Path) -> None:
    """Makes `folder` one that load_tokenizer takes in place of the dataset's, where that is not at hand.

    What is there stays until the copy is whole. Raises OSError.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        for name in FILES:
            if (dataset.folder / name).exists():
                shutil.copyfile(dataset.folder / name, partial / name)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: gpt2, a tokenizer.json, a SentencePiece .model, a folder with one of them, or a hub name.

    Raises UserError when it cannot be loaded.
    """
    if name == "gpt2":
        return Gpt2Tokenizer()
    path = Path(name)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    if path.suffix == ".json":
        return JsonTokenizer(name, _read(path).decode("utf-8", "replace"), None)
    if path.suffix == ".model":
        return SentencePieceTokenizer(name, _read(path))
    return _hub_tokenizer(name)


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether `other`, perhaps of another library, gives the ids of `one` for a line that has some of everything."""
    try:
        return one.encode(one.probe) == other.encode(one.probe)
    except UserError:  # a character that a character set has not
        return False


def merges_of(words: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each word of a byte-pair encoding, in the order of its ids, was merged from."""
    rank = {word: i for i, word in enumerate(words)}
    for word in words:
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 2:
            pairs = [rank.get(left + right, math.inf) for left, right in pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _letters_of_bytes() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) if byte in printed else chr(256 + others.index(byte)) for byte in range(256)]


def train_bpe(vocab_size: int, texts: Iterable[str]) -> JsonTokenizer:
    """A byte-level BPE for source code: every byte has an id, and the same texts give the same tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CODE_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer(f"bpe:{vocab_size}", backend.to_str(), None)


def _hub_tokenizer(name: str) -> JsonTokenizer:
    go_offline_without_network()
    from transformers import AutoTokenizer

    loaded: Any = _load(
        lambda: AutoTokenizer.from_pretrained(name),
        f"tokenizer {name}: without a network pass --tokenizer with the path of a tokenizer.json, a SentencePiece .model or "
        "their folder. A gated one (meta-llama/Llama-2-7b-hf is) needs access: ask for it on its page of the Hugging Face "
        "hub, then run `hf auth login`",
    )
    if not loaded.is_fast:
        raise UserError(f"tokenizer {name} has no tokenizer.json: pass --tokenizer gpt2 or a tokenizer that has one")
    return JsonTokenizer(name, loaded.backend_tokenizer.to_str(), loaded.eos_token_id)


def _load(load: Callable[[], T], what: str) -> T:
    """Runs `load` for at most LOADING_S: libraries wait minutes for a network that swallows packets."""
    result: list[T] = []
    error: list[Exception] = []

    def run() -> None:
        try:
            result.append(load())
        except Exception as caught:  # each library has errors of its own for a missing network or file
            error.append(caught)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LOADING_S)
    if result:
        return result[0]
    cause = str(error[0]).strip().split("\n")[0][:200] if error else f"nothing came in {LOADING_S:.0f} s"
    raise UserError(f"cannot load {what}\n({cause})")


def _count_prefix(tokenizer: Tokenizer) -> int:
    """LLaMA's tokenizers put a word-start before every text: count what a lone line break has beyond one behind a letter."""
    return max(0, len(tokenizer.encode("\n")) - (len(tokenizer.encode("a\n")) - len(tokenizer.encode("a"))))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
