"""transformers without its log and progress bars: what it has to say about a folder goes into our errors instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it, transformers logs errors only."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """What one of its errors says, without the paragraphs of advice that follow."""
    return shorten(str(error), 300, placeholder=" ...")
