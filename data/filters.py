"""Whether a document is worth training on: heuristics on its characters, words and lines.

The rules are those of C4 and Gopher (Rae et al. 2021, appendix A1.1) in their simplest form, with limits that keep
source code.
"""

from data.config import CleaningSettings


def why_rejected(text: str, settings: CleaningSettings) -> str | None:
    """The first rule that the document breaks, e.g. "few_letters"; None if it breaks none."""
    if len(text.strip()) < settings.min_characters:
        return "too_short"
    visible = "".join(text.split())
    if sum(map(str.isalpha, visible)) < settings.min_letter_share * len(visible):
        return "few_letters"
    words = text.split()
    if len(visible) > settings.max_mean_word * len(words):
        return "long_words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) - len(set(lines)) > settings.max_repeated_line_share * len(lines):
        return "repeated_lines"
    return None
