"""What the data part may pull in."""

import subprocess
import sys


def test_settings_tasks_and_loader_import_without_torch_ray_or_datasets():
    code = (
        "import sys, data.config, data.tasks, data.corpus, data.formats, data.loader, data.tokenized\n"
        "heavy = ('torch', 'ray', 'vllm', 'datasets', 'pyarrow', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_documents_are_the_same_in_every_process():
    code = (
        "import hashlib; from data.config import CorpusSettings; from data.stdlib_text import *\n"
        "settings = CorpusSettings(stdlib_bytes=150_000)\n"
        "print(hashlib.sha256(repr((stdlib_documents(settings), stdlib_instructions('train'))).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
