"""The documentation site: `make docs` builds it into build/docs without a network, and any warning fails it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from scripts.reference import write_reference  # noqa: E402

write_reference(HERE / "reference")

project = "Steersman"
release = metadata.version("steersman")
copyright = "the Steersman maintainers"
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Blocks of shell commands, JSON lines and proto3 are shown as they are where a lexer does not know something of them.
suppress_warnings = ["misc.highlighting_failure"]
html_theme = "furo"
html_title = f"Steersman {release}"
html_show_sourcelink = False
html_theme_options = {"source_directory": "docs/", "top_of_page_buttons": []}
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def _keep_inside(text: str, folder: Path) -> str:
    """Links to files of the repository that are no pages of the site become their text."""

    def mend(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        page = target.is_relative_to(HERE) and target.suffix == ".md" and target.is_file()
        if not target.exists():
            raise ValueError(f"{folder.name}: the link to {link[2]} leads nowhere")
        return link[0] if page else link[1]

    return _LINK.sub(mend, text)


def setup(app) -> None:
    def read(app, name: str, source: list[str]) -> None:
        source[0] = _keep_inside(source[0], (HERE / name).parent)

    def include(app, path: Path, parent: str, source: list[str]) -> None:
        source[0] = _keep_inside(source[0], (HERE / path).resolve().parent)

    app.connect("source-read", read)
    app.connect("include-read", include)
