"""What the site shows that lies elsewhere: pages of the repository, pictures, docstrings."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    pictures = (path.relative_to(root) for path in sorted((root / "benchmarks").rglob("*.png")))
    for name in (*PAGES, *(path.as_posix() for path in pictures)):
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, **_):
    """Links as they are in the repository, from where the page is in the site."""
    if page.file.src_uri in PAGES:
        return markdown.replace("](docs/", "](")
    return markdown.replace("../benchmarks/", "benchmarks/")


class SharedDescriptions(griffe.Extension):
    """Takes `obs, act: sizes` of a docstring as one entry of two names, not a name and a type."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            names = r"(?m)^( +)(\w+(?:, \w+)+)(?=:)"
            joined = lambda found: found[1] + found[2].replace(", ", ",")  # noqa: E731
            obj.docstring.value = re.sub(names, joined, obj.docstring.value)
