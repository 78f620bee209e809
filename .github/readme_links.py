"""Makes the README's relative links absolute, for the page of the package index, which has no files beside it.

python .github/readme_links.py https://github.com/OWNER/NAME TAG  # changes README.md in place
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|mailto:|#)([^)\s]+)\)")


def make_absolute(text: str, address: str, ref: str) -> str:
    """Point relative links and images of Markdown, outside blocks of code, at a repository's files as of ``ref``.

    >>> make_absolute("[Docs](docs/index.md#top), ![picture](a.svg)", "https://forge/me/it", "v1")
    '[Docs](https://forge/me/it/blob/v1/docs/index.md#top), ![picture](https://forge/me/it/raw/v1/a.svg)'
    """
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    for place in range(0, len(parts), 2):
        parts[place] = _LINK.sub(
            lambda m: f"{m[1]}{m[2]}({address}/{'raw' if m[1] else 'blob'}/{ref}/{m[3]})", parts[place]
        )
    return "".join(parts)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[1] / "README.md"
    readme.write_text(make_absolute(readme.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
