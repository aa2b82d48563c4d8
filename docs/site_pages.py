"""Made pages of the documentation site: README and CONTRIBUTING, a reference by package."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "midstream"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; their links into `docs/` lead to the page beside them."""
    for page, name in (("index.md", "README.md"), ("CONTRIBUTING.md", "CONTRIBUTING.md")):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for name, modules in packages().items():
        listed = "\n\n".join(f"::: {module}" for module in modules)
        page = f"# midstream.{name}\n\n{listed}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def on_config(config: Any) -> Any:
    """Put the reference at the end of the navigation."""
    config["nav"].append({"Reference": [f"reference/{name}.md" for name in packages()]})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What GitHub reads and mkdocs does not: names behind fences, links to CONTRIBUTING.md."""
    named = re.sub(r"^```(\w+) (\S+)$", r'```\1 title="\2"', markdown, flags=re.MULTILINE)
    return named.replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md")


def packages() -> dict[str, list[str]]:
    """By package of `midstream`, its modules that have public names."""
    found: dict[str, list[str]] = {}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        modules = (
            path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            for path in sorted(folder.rglob("*.py"))
            if not path.name.startswith("_")
        )
        found[folder.name] = list(modules)
    return found
