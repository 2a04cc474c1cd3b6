"""The documentation as a site: ``make docs``. The pages are those that GitHub shows."""

import os

import depthprobe

project = "depthprobe"
author = "The depthprobe contributors"
version = release = depthprobe.__version__

# sources are the whole repository, so that a link between files is the same here and on GitHub
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "analyses/*/*.md",
    "examples/README.md",
    "reports/README.md",
]
exclude_patterns = [".*", "runs", "build", "dist", "depthprobe", "tests", "**/runs"]

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the outputs are committed
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"depthprobe {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

os.environ.setdefault("HF_HUB_OFFLINE", "1")
