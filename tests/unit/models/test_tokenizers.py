"""Three text formats give the ids of the libraries they come from, before and after being saved as a model folder."""

import base64
import inspect
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from random import Random

import pytest
import sentencepiece
from tiktoken import _educational

from infra.errors import CheckpointError, ConfigError
from models.tokenizers import Tokenizer, load_tokenizer, train_bpe
from models.tokenizers.base import LLAMA3_SPLIT, llama3_specials
from models.tokenizers.tiktoken import TiktokenTokenizer, slices

CORPUS = [
    "The llama walked over the hills, and the other llamas followed it slowly.\n\nIt's 12 + 345 = 357; isn't it?",
    "def add(a, b):\n    return a + b  # adds 2 numbers\n\tprint('añadir', \"größe\", 日本語)\r\n",
    inspect.getsource(textwrap)[:8000],
]
TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\tmixed \r\n whitespace \u00a0\u2003 ",
    "don't WE'LL 1234567 3.14159 x²",
    "añadir größe 日本語 🦙🦙 \u0000\ufffd e\u0301",
    "<|eot_id|><s>[INST]</s><unk><|begin_of_text|> <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaa the the the",
    "def f(x):\n    return {'a': [1, 2]}  \n",
]
FRAGMENTS = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "23",
    "é",
    "日本",
    "🦙",
    "\xa0",
    "\u2003",
    "\x85",
    "\x1c",
    "'s",
    "'LL",
    "def ",
    "_",
    "\u200d",
    "́",
    "ſ",
    "İ",
    "²",
    "٣",
    "=",
    "self.",
    "▁",
    "<0x41>",
]


def random_text(random: Random) -> str:
    return "".join(random.choice(FRAGMENTS) for _ in range(random.randrange(25)))


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A toy of Llama 3's rank file: 256 bytes and 164 merges, trained on the spot."""
    text = "\n".join(CORPUS)
    return _educational.bpe_train(data=text, vocab_size=420, pat_str=LLAMA3_SPLIT, visualise=None)


@pytest.fixture(scope="module")
def llama3_folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama2")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module", params=["tiktoken", "sentencepiece", "trained"])
def tokenizer(request: pytest.FixtureRequest, llama3_folder: Path, llama2_folder: Path) -> Tokenizer:
    if request.param == "trained":
        return train_bpe(CORPUS, 400)
    return load_tokenizer(llama3_folder if request.param == "tiktoken" else llama2_folder)


def test_text_survives(tokenizer: Tokenizer) -> None:
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_names_in_text_stay_text_unless_allowed(tokenizer: Tokenizer) -> None:
    special_ids = set(tokenizer.specials.values()) - {tokenizer.specials.get("<unk>")}
    for name, index in tokenizer.specials.items():
        if name == "<unk>":
            continue
        assert not special_ids & set(tokenizer.encode(f"a{name}b")), name
        assert index in tokenizer.encode(f"a{name}b", allow_special=True), name
    text = f"one{tokenizer.eos}two"
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.eos not in tokenizer.decode(ids)
    assert tokenizer.eos in tokenizer.decode(ids, skip_special=False)


def test_saved_folder_gives_the_same_ids_here_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for attribute in ("vocab_size", "bos_id", "eos_id", "eot_id", "pad_id", "stop_ids", "specials", "chat_format"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute), attribute
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert len(theirs) == tokenizer.vocab_size
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == text
        if "<" not in text:  # transformers reads special names in any text
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert theirs(text).input_ids == [tokenizer.bos_id, *ids]
    assert tokenizer.encode_batch(TRICKY) == [tokenizer.encode(text) for text in TRICKY]


def test_random_texts_agree_after_saving(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again, random = load_tokenizer(tmp_path), Random(0)
    for _ in range(500):
        text = random_text(random)
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        assert tokenizer.decode(ids) == again.decode(ids), text


def test_tiktoken_ids_are_the_librarys(ranks: dict[bytes, int], llama3_folder: Path) -> None:
    ours = load_tokenizer(llama3_folder)
    theirs = _educational.SimpleBytePairEncoding(pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks)
    for text in TRICKY:
        assert ours.encode(text) == theirs.encode(text, visualise=None)
    assert ours.vocab_size == len(ranks) + 256
    assert ours.bos_id == len(ranks) and ours.eos_id == len(ranks) + 1
    assert ours.stop_ids == tuple(len(ranks) + offset for offset in (1, 8, 9))


def test_llama3_special_ids() -> None:
    """The offsets of Llama 3.1's tokenizer: 128000 begin_of_text, ..., 128009 eot_id, 128255 the last reserved."""
    names = llama3_specials()
    assert len(names) == len(set(names)) == 256
    expected = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>"}
    expected |= {5: "<|reserved_special_token_2|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
    expected |= {10: "<|python_tag|>", 11: "<|reserved_special_token_3|>", 255: "<|reserved_special_token_247|>"}
    assert {index: names[index] for index in expected} == expected


def test_slices_follow_the_rule() -> None:
    assert list(slices("abcdefgh  ij", max_chars=100, max_run=3)) == ["abc", "def", "gh  ij"]
    assert list(slices("ab      c", max_chars=100, max_run=4)) == ["ab    ", "  c"]
    assert list(slices("abcdefgh", max_chars=5, max_run=100)) == ["abcde", "fgh"]
    assert list(slices("abcdef", max_chars=5, max_run=2)) == ["ab", "cd", "e", "f"]


def test_very_long_texts_encode(llama3_folder: Path) -> None:
    tokenizer = load_tokenizer(llama3_folder)
    for text in ("x" * 60_000 + " " * 60_000, "ab " * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a" * 50_001) == tokenizer.encode("a" * 25_000) * 2 + tokenizer.encode("a")


def test_sentencepiece_ids_are_the_librarys(llama2_folder: Path) -> None:
    ours = load_tokenizer(llama2_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama2_folder / "tokenizer.model"))
    for text in TRICKY:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.eot_id, ours.vocab_size) == (1, 2, 2, 400)
    assert ours.stop_ids == (2,)


def test_trained_digits_are_single_tokens() -> None:
    tokenizer = train_bpe([*CORPUS, "123 123 123 " * 50], 400)
    ids = tokenizer.encode("123+4567=")
    assert [tokenizer.decode([i]) for i in ids] == list("123+4567=")
    assert [name for name in llama3_specials(16) if name not in tokenizer.specials] == []
    assert sorted(tokenizer.specials.values()) == list(range(tokenizer.vocab_size - 16, tokenizer.vocab_size))
    assert tokenizer.vocab_size <= 400


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    program = (
        "import sys, json; from models.tokenizers import train_bpe; "
        "train_bpe(json.load(open(sys.argv[1])), 500).save(sys.argv[2])"
    )
    (tmp_path / "texts.json").write_text(json.dumps(CORPUS * 20))
    for run, threads in (("a", "1"), ("b", "4")):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": "."}
        command = [sys.executable, "-c", program, str(tmp_path / "texts.json"), str(tmp_path / run)]
        subprocess.run(command, env=environment, check=True, timeout=60)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_errors_name_the_trouble(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size 100"):
        train_bpe(CORPUS, 100)
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== one\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model:2"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="gaps"):
        TiktokenTokenizer({b"a": 0, b"b": 2})


def test_older_hf_layouts_load_through_transformers(tmp_path: Path) -> None:
    """vocab.json + merges.txt, as GPT-2 era folders have."""
    trained = train_bpe(CORPUS, 300)
    backend = json.loads(trained.to_backend().to_str())
    vocabulary = {**backend["model"]["vocab"], "<|endoftext|>": len(backend["model"]["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["model"]["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("over the hills")) == "over the hills"
    assert loaded.eos_id == vocabulary["<|endoftext|>"] and loaded.chat_format is None
