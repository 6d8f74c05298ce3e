"""From a file of old books to a list of clean stories (standard library only).

The file is plain text: one paragraph per block, blocks separated by blank lines, books one after the other.
Editions disagree about quotation marks and capitals, and carry prefaces, tables of contents, sources and
footnotes. A small model has no capacity to spare for that, so it is taken out here.
"""

import itertools
import re
from pathlib import Path

# What editors and scanners write and storytellers do not.
_EDITORIAL = re.compile(
    r"^\[|^\((\d|From|Adapted)|^From '|^Slavonic story|Parallels\.|Source\.|Remarks\.|Folk-?[Ll]ore\b"
    r"|[Ff]airy [Bb]ooks?\b|Grimms?\b|Populars?\b|popula(ires|res)\b|Marchen|[Tt]ranslated (from|by)"
    r"|[Pp]refaces?\b|Messrs|Mrs\. Lang|\bpp?\. \d|\bvols?\. |No\. \d|Electronic|disclaimers|archive\.org"
)
_STORY_START = re.compile(
    r"[A-Z]{2,} (?!THE|THIS|HE|SHE)|Once upon a time|Once,? (there )?(was|were|lived|on a time|when)|Long,? (long )?ago"
    r"|A long time ago|(In|Many) (the )?(old|olden|ancient|former) (times|days)|(Many|Some|A hundred) years ago"
    r"|There (once )?(was|were|lived) (once |a certain )|There once (was|lived)"
    r"|(A|An|The|Two|Three) [\w' -]{3,30} (was|were|had|lived|dwelt|there) once\b"
)
# 'Such' speech: from an opening mark to one that follows punctuation, or to the paragraph's end: where a speaker goes
# on in the next paragraph, printers leave the first open. An apostrophe in a word or before 'tis is no mark.
_OPENING = r"(?<!\w)'(?!(?:tis|twas|twill|em)\b)"
_SPEECH = re.compile(_OPENING + r"((?:(?!\s')[^\"])*?)(?:(?<=[.,!?;:-])'(?!\w)|$)", re.I)
_FIRST_MARK = re.compile(_OPENING + r'|"', re.I)


def _clean(paragraph: str) -> str:
    text = re.sub(r"\[[^\]]*\]|\(\d+\)|[_*]", "", paragraph).replace("`", "'")
    text = re.sub(r"^[A-Z]{2,}(?= )", lambda match: match[0].capitalize(), text)  # the printer's "ONCE upon a time"
    mark = _FIRST_MARK.search(text)
    if mark and mark[0] == "'":  # British marks: make them American, the inner ones too
        text = _SPEECH.sub(r'"\1"', text.replace('"', "\0")).replace("\0", "'")
    return re.sub(r"\s+", " ", text).strip()


def read_stories(path: str | Path) -> list[str]:
    """Returns the stories of a corpus file, in its order, each as paragraphs joined by blank lines."""
    paragraphs = [p for p in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8")) if p.strip()]
    editorial = [i for i, paragraph in enumerate(paragraphs) if _EDITORIAL.search(paragraph)]
    skipped = set(editorial)
    for a, b in itertools.pairwise(editorial):
        if b - a <= 6:  # notes come in runs: what stands between two of them is one too
            skipped.update(range(a, b))

    stories: list[list[str]] = [[]]
    for i, paragraph in enumerate(paragraphs):
        if stories[-1] and (i in skipped or _STORY_START.match(paragraph)):
            stories.append([])
        text = _clean(paragraph)
        is_footnote, is_heading = paragraph.startswith("*"), not text.endswith(tuple(".!?:;,-\"')"))
        if not (i in skipped or is_footnote or is_heading):
            stories[-1].append(text)
    return ["\n\n".join(story) for story in stories if story]
